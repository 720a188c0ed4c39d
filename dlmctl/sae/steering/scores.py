"""Scores of steering: how much more of a concept there is, and what it costs in fluency.

    C = (c_after - c_before) / 100              c    concept in the text, as judged, 0..100
    P = (ppl_before - ppl_after) / ppl_before   ppl  perplexity of prompt and completion
    S = C + lambda P

(DLM-Scope, arXiv 2602.05859, equation 19 and its code.) Before and after are two completions of one
prompt with the same noise, the second steered. Averages are taken over the completions of a feature
first, then over features. P has no lower bound, so that one text without sense outweighs all
others: beside the means stand medians, and means of P clipped to [-1, 1].
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any, Literal, NamedTuple, TypeVar

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import OnError, Record, each, field

T = TypeVar("T")
Key = tuple[str | int, int]
"""A prompt's id and the number of the sample."""
Concept = tuple[str, int, int]
"""Dictionary, layer, feature."""
Judged = Literal["reward", "score"]
"""Fields of a record that may hold how strongly it expresses the concept: 0..1 and 0..100."""

TWINS = ("seed", "revision", "temperature")
"""What two completions have in common that differ by steering alone."""


class Treatment(NamedTuple):
    """How a completion was steered, as `rollout.steer` tells it."""

    sae: str
    layer: int
    feature: int
    amplitude: float
    scope: str
    time: tuple[float, float] | None

    @property
    def concept(self) -> Concept:
        return self.sae, self.layer, self.feature

    def fields(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {**self._asdict(), "time": None if self.time is None else list(self.time)}


Name = tuple[Key, Treatment | None]
"""What tells a text from others."""


class Text(NamedTuple):
    """A completion, of which the ids are not kept."""

    key: Key
    treatment: Treatment | None
    """None is unsteered."""
    prompt: str | None
    """None where the record has ids alone."""
    completion: str
    where: str
    origin: Mapping[str, Any]
    """What its twin must have too, where both have it."""
    concept: float | None = None
    """How strongly it expresses the concept, 0..100, where the record says so."""
    perplexity: float | None = None
    """Where the record says so."""

    @property
    def name(self) -> Name:
        return self.key, self.treatment


class Pair(NamedTuple):
    """A completion without and with steering."""

    before: Text
    after: Text
    treatment: Treatment


class Outcome(NamedTuple):
    """What was measured of a pair; None where it was not."""

    concept: tuple[float, float] | None
    """Before and after, 0..100."""
    perplexity: tuple[float, float] | None
    failed: int = 0
    """Answers of the judge that hold no number."""

    def gain(self) -> float | None:
        """C."""
        return None if self.concept is None else (self.concept[1] - self.concept[0]) / 100

    def fluency(self) -> float | None:
        """P."""
        if self.perplexity is None:
            return None
        before, after = self.perplexity
        return (before - after) / before


def text_of(record: Record, judged: Judged | None = None, perplexity: str | None = None) -> Text:
    """A record of `rollout` as a text.

    Args:
        judged: field that holds how strongly the concept is expressed.
        perplexity: field that holds the perplexity.

    Raises:
        DataError: a field is missing or out of its range, or several features are steered at once.
    """
    made = field(record, "rollout", dict, "'dlmctl rollout' writes it")
    concept = None
    if judged is not None:
        most = 1 if judged == "reward" else 100
        hint = "'dlmctl verify' writes it" if judged == "reward" else "a judge writes it"
        concept = _within(record, judged, 0, most, hint) * (100 / most)
    fluency = None if perplexity is None else _within(record, perplexity, 1e-300, math.inf)
    return Text(
        (field(record, "id", (str, int)), field(record, "sample", int)),
        _treatment(made.get("steer"), record.where),
        _prompt(record),
        field(record, "completion", str, "'dlmctl rollout' writes it"),
        record.where,
        {
            **{name: made.get(name) for name in TWINS},
            "prompt": (record.get("tokens") or {}).get("prompt"),
        },
        concept,
        fluency,
    )


def baseline_of(
    records: Iterable[Record], read: Callable[[Record], Text], on_error: OnError = "fail"
) -> dict[Key, Text]:
    """Unsteered texts by id and sample.

    Raises:
        DataError: one of them is steered, or there twice.
    """
    found: dict[Key, Text] = {}

    def single(record: Record) -> Text:
        text = read(record)
        if text.treatment is not None:
            raise DataError("it is steered, so it is no baseline")
        if text.key in found:
            raise DataError(f"it is the same sample as {found[text.key].where}")
        return text

    for text in _sound(records, single, on_error):
        found[text.key] = text
    return found


def pairs_of(
    records: Iterable[Record],
    baseline: Mapping[Key, Text],
    read: Callable[[Record], Text],
    on_error: OnError = "fail",
) -> Iterator[Pair]:
    """Steered texts beside their twins.

    Raises:
        DataError: a record is not steered, is there twice, or has no twin in the baseline.
    """
    seen: dict[Name, str] = {}

    def pair(record: Record) -> Pair:
        text = read(record)
        if text.treatment is None:
            raise DataError("it is not steered: field 'rollout.steer' is missing")
        if text.key not in baseline:
            raise DataError(
                f"no baseline has id {text.key[0]!r} and sample {text.key[1]}: sample the same "
                "prompts without --steer"
            )
        before = baseline[text.key]
        for name, value in text.origin.items():
            if None not in (value, before.origin[name]) and value != before.origin[name]:
                raise DataError(
                    f"its {name} is not that of its baseline {before.where}: the two are to differ "
                    "by --steer alone"
                )
        if text.name in seen:
            raise DataError(f"it is the same sample as {seen[text.name]}, steered alike")
        seen[text.name] = text.where
        return Pair(before, text, text.treatment)

    return _sound(records, pair, on_error)


def outcomes_of(
    pairs: Iterable[Pair],
    concept: Callable[[Text, Treatment], tuple[float | None, int]] | None = None,
    perplexity: Mapping[Name, float | None] | None = None,
) -> Iterator[tuple[Treatment, Outcome]]:
    """What was measured of each pair, where it is not given what the records say.

    Args:
        concept: how strongly a text expresses the concept of a feature, 0..100, and how many
            answers about that failed.
        perplexity: of each text.
    """
    for pair in pairs:
        texts = (pair.before, pair.after)
        judged = [(t.concept, 0) if concept is None else concept(t, pair.treatment) for t in texts]
        fluent = [t.perplexity if perplexity is None else perplexity[t.name] for t in texts]
        failed = sum(lost for _, lost in judged)
        yield pair.treatment, Outcome(_both([c for c, _ in judged]), _both(fluent), failed)


def rows_of(
    outcomes: Iterable[tuple[Treatment, Outcome]], weight: float, bound: bool | None = None
) -> list[dict[str, Any]]:
    """A row for each feature and way of steering, and one over the features of each way.

    Args:
        weight: lambda.
        bound: whether perplexities are upper bounds; None where that is not known.
    """
    grouped: dict[Treatment, list[Outcome]] = {}
    for treatment, outcome in outcomes:
        grouped.setdefault(treatment, []).append(outcome)
    rows = {t: _feature_row(t, found, weight, bound) for t, found in grouped.items()}
    ways: dict[Treatment, list[dict[str, Any]]] = {}
    for treatment, row in rows.items():
        ways.setdefault(treatment._replace(feature=-1), []).append(row)
    several = [_summary_row(found, bound) for found in ways.values() if len(found) > 1]
    return [*rows.values(), *several]


def _feature_row(
    treatment: Treatment, outcomes: Sequence[Outcome], weight: float, bound: bool | None
) -> dict[str, Any]:
    concept = [o.concept for o in outcomes if o.concept is not None]
    perplexity = [o.perplexity for o in outcomes if o.perplexity is not None]
    C = _known(o.gain() for o in outcomes)
    P = _known(o.fluency() for o in outcomes)
    both = [(o.gain(), o.fluency()) for o in outcomes]
    S = [gain + weight * loss for gain, loss in both if gain is not None and loss is not None]
    c, p, clipped = _mean(C), _mean(P), _mean([min(1.0, max(-1.0, value)) for value in P])
    return {
        **treatment.fields(),
        "n": len(outcomes),
        "n_C": len(C),
        "n_P": len(P),
        "failed": sum(o.failed for o in outcomes),
        "c_before": _mean([before for before, _ in concept]),
        "c_after": _mean([after for _, after in concept]),
        "C": c,
        "C_median": _median(C),
        "ppl_before": _median([before for before, _ in perplexity]),
        "ppl_after": _median([after for _, after in perplexity]),
        "P": p,
        "P_median": _median(P),
        "P_clipped": clipped,
        "S": None if c is None or p is None else c + weight * p,
        "S_median": _median(S),
        "S_clipped": None if c is None or clipped is None else c + weight * clipped,
        "bound": bound,
    }


def _summary_row(rows: Sequence[dict[str, Any]], bound: bool | None) -> dict[str, Any]:
    """Means and medians over the rows of features that have a value."""
    made: dict[str, Any] = {**rows[0], "feature": "all", "features": len(rows), "bound": bound}
    for name in ("n", "n_C", "n_P", "failed"):
        made[name] = sum(row[name] for row in rows)
    for name in ("c_before", "c_after", "C", "P", "P_clipped", "S", "S_clipped"):
        made[name] = _mean(_known(row[name] for row in rows))
    for name, source in {
        "C_median": "C",
        "P_median": "P",
        "S_median": "S",
        "ppl_before": "ppl_before",
        "ppl_after": "ppl_after",
    }.items():
        made[name] = _median(_known(row[source] for row in rows))
    return made


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
        )
    except (KeyError, TypeError, ValueError):
        raise DataError(
            "field 'rollout.steer' is not as 'dlmctl rollout' writes it", where
        ) from None


def _prompt(record: Record) -> str | None:
    """The prompt as text; of a conversation its contents, a line for each."""
    if isinstance(record.get("prompt"), str):
        return str(record["prompt"])
    messages = record.get("messages", record.get("prompt"))
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return None
    return "".join(f"{message.get('content', '')}\n" for message in messages)


def _within(record: Record, name: str, least: float, most: float, hint: str = "") -> float:
    value = float(field(record, name, (int, float), hint))
    if not least <= value <= most:
        raise DataError(f"field '{name}' is {value:g}, which is no value it can have", record.where)
    return value


def _sound(
    records: Iterable[Record], make: Callable[[Record], T], on_error: OnError
) -> Iterator[T]:
    """What is made of each record, of those that it can be made of."""
    made: list[T] = []
    left_out = 0

    def run(record: Record) -> Record:
        made.append(make(record))
        return record

    for record in each(records, run, on_error):
        left_out += "error" in record
        yield from made
        made.clear()
    if left_out:
        print(f"dlmctl: left out: {left_out} records with an error", file=sys.stderr)


def _both(values: Sequence[float | None]) -> tuple[float, float] | None:
    before, after = values
    return None if before is None or after is None else (before, after)


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None
