"""Steered completions and their twins: the same prompt and the same noise without steering."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import OnError, Record, each, field

T = TypeVar("T")
Key = tuple[str | int, int]
"""A prompt's id and the number of the sample."""
ScoreField = Literal["reward", "score"]
"""Fields of a record that may say how strongly it expresses the concept: 0..1 and 0..100."""

SHARED = ("seed", "revision", "temperature")
"""What two completions have in common if steering is their only difference."""


class Treatment(NamedTuple):
    """How a completion was steered, as `rollout.steer` says."""

    sae: str
    layer: int
    feature: int
    amplitude: float
    scope: str
    time: tuple[float, float] | None
    unit: str = "activation"

    def fields(self) -> dict[str, Any]:
        """The fields of `rollout.steer`."""
        return {**self._asdict(), "time": None if self.time is None else list(self.time)}


Name = tuple[Key, Treatment | None]
"""What tells a text from others."""


class SampledText(NamedTuple):
    """A completion with its prompt; their token ids are not kept."""

    key: Key
    treatment: Treatment | None
    """None: unsteered."""
    prompt: str | None
    """None if the record has ids only."""
    completion: str
    where: str
    origin: Mapping[str, Any]
    """Values that its twin has too, if both have them."""
    concept: float | None = None
    """How strongly it expresses the concept, 0..100, if the record says so."""
    perplexity: float | None = None
    """If the record says so."""
    push: float | None = None
    """Mean |push| / |H| of its steering, if the record says so."""

    @property
    def name(self) -> Name:
        return self.key, self.treatment


class Twins(NamedTuple):
    """A completion without and with steering."""

    before: SampledText
    after: SampledText
    treatment: Treatment


def read_sampled_text(
    record: Record, score_field: ScoreField | None = None, perplexity: str | None = None
) -> SampledText:
    """A record of `rollout` as a text.

    Args:
        score_field: field that says how strongly the concept is expressed.
        perplexity: field that contains the perplexity.

    Raises:
        DataError: a field is missing or out of its range, or several features are steered at once.
    """
    rollout = field(record, "rollout", dict, "'dlmctl rollout' writes it")
    concept = None
    if score_field is not None:
        highest = 1 if score_field == "reward" else 100
        hint = "'dlmctl verify' writes it" if score_field == "reward" else "a judge writes it"
        concept = _within(record, score_field, 0, highest, hint) * (100 / highest)
    return SampledText(
        (field(record, "id", (str, int)), field(record, "sample", int)),
        _treatment(rollout.get("steer"), record.where),
        _prompt(record),
        field(record, "completion", str, "'dlmctl rollout' writes it"),
        record.where,
        {
            **{name: rollout.get(name) for name in SHARED},
            "prompt": (record.get("tokens") or {}).get("prompt"),
        },
        concept,
        None if perplexity is None else _within(record, perplexity, 1e-300, math.inf),
        None if rollout.get("push") is None else _within(Record(rollout), "push", 0, math.inf),
    )


def read_baseline(
    records: Iterable[Record], read: Callable[[Record], SampledText], on_error: OnError = "fail"
) -> dict[Key, SampledText]:
    """Unsteered texts by id and sample.

    Raises:
        DataError: one of them is steered, or comes twice.
    """
    baseline: dict[Key, SampledText] = {}

    def add(record: Record) -> None:
        text = read(record)
        if text.treatment is not None:
            raise DataError("it is steered, so it is no baseline")
        if text.key in baseline:
            raise DataError(f"it is the same sample as {baseline[text.key].where}")
        baseline[text.key] = text

    for _ in _usable(records, add, on_error):
        pass
    return baseline


def read_twins(
    records: Iterable[Record],
    baseline: Mapping[Key, SampledText],
    read: Callable[[Record], SampledText],
    on_error: OnError = "fail",
) -> Iterator[Twins]:
    """Steered texts with their twins.

    Raises:
        DataError: a record is not steered, comes twice, or has no twin in the baseline.
    """
    seen: dict[Name, str] = {}

    def pair(record: Record) -> Twins:
        after = read(record)
        if after.treatment is None:
            raise DataError("it is not steered: field 'rollout.steer' is missing")
        if after.key not in baseline:
            raise DataError(
                f"no baseline has id {after.key[0]!r} and sample {after.key[1]}: sample the same "
                "prompts without --steer"
            )
        before = baseline[after.key]
        for name, value in after.origin.items():
            if None not in (value, before.origin[name]) and value != before.origin[name]:
                raise DataError(
                    f"its {name} is not that of its baseline {before.where}: the two are to differ "
                    "by --steer alone"
                )
        if after.name in seen:
            raise DataError(f"it is the same sample as {seen[after.name]}, steered alike")
        seen[after.name] = after.where
        return Twins(before, after, after.treatment)

    return _usable(records, pair, on_error)


def _treatment(steers: Any, where: str) -> Treatment | None:
    if not steers:
        return None
    if len(steers) > 1:
        raise DataError(
            f"{len(steers)} features are steered at once, and scores are of one: sample each alone",
            where,
        )
    [steer] = steers
    try:
        time = steer["time"]
        return Treatment(
            str(steer["sae"]),
            int(steer["layer"]),
            int(steer["feature"]),
            float(steer["amplitude"]),
            str(steer["scope"]),
            None if time is None else (float(time[0]), float(time[1])),
            str(steer.get("unit", "activation")),
        )
    except (KeyError, TypeError, ValueError):
        raise DataError(
            "field 'rollout.steer' is not as 'dlmctl rollout' writes it", where
        ) from None


def _prompt(record: Record) -> str | None:
    """The prompt as text; for a conversation the contents of its messages, a line each."""
    if isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    messages = record.get("messages", record.get("prompt"))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return None
    return "".join(f"{message.get('content', '')}\n" for message in messages)


def _within(record: Record, name: str, lowest: float, highest: float, hint: str = "") -> float:
    value = float(field(record, name, (int, float), hint))
    if not lowest <= value <= highest:
        raise DataError(f"field '{name}' is {value:g}, which is no value it can have", record.where)
    return value


def _usable(
    records: Iterable[Record], read: Callable[[Record], T], on_error: OnError
) -> Iterator[T]:
    """What `read` returns for each record; how many have an error is said on stderr."""
    results: list[T] = []
    left_out = 0

    def run(record: Record) -> Record:
        results.append(read(record))
        return record

    for record in each(records, run, on_error):
        left_out += "error" in record
        yield from results
        results.clear()
    if left_out:
        print(f"dlmctl: left out: {left_out} records with an error", file=sys.stderr)
