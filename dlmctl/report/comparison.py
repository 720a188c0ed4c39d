"""Verified records compared with those of a baseline, paired by prompt and sample.

difference  of each measure of `stats`, the records' minus the baseline's, over samples that both
            have. Its interval is that of Efron's percentile bootstrap over prompts: the samples of
            a prompt, of both sides, are drawn together.
p           of the randomization test that exchanges the two sides of a prompt: the share of
            exchanges whose difference is at least as large, over all of them if there are few
            prompts. For accuracy with one sample a prompt this is McNemar's exact test.
mcnemar     p of McNemar's exact test (1947; two-sided, binomial) on the prompts that are right on
            one side only. Of several samples, more than half must be right.
change      worse or better if the interval does not contain 0 and p is at most 1 - confidence.
            (Ours: the interval alone, at 95 %, calls 4 % of 600 equal models worse on ten prompts,
            instead of 2.5 %; one prompt would be enough.)
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from dlmctl.records import jsonl
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.report.statistics import Sample, label, ratios, sample
from dlmctl.settings.report import Comparing

COSTS = frozenset({"nfe", "tokens"})
"""Measures of which more is worse."""
NAMED = 10
"""Most prompts without a counterpart whose ids are shown."""
DRAWS = 2**22
"""Most draws in memory at once."""
ROUNDING = 1e-9
"""Relative difference of two differences below which they are equal."""


@dataclass
class Prompt:
    """The samples of a prompt on one side."""

    text: bytes
    """Hash of what it asks."""
    samples: dict[int, tuple[Sample, str]] = field(default_factory=dict)
    """Each with the row that it counts in, by its number."""


Side = dict[tuple[str, str | int], Prompt]
"""Prompts by task and id."""


class Pair(NamedTuple):
    """Samples of a prompt in the order of their numbers, which are the same on both sides."""

    key: tuple[str, str | int]
    baseline: list[Sample]
    compared: list[Sample]
    labels: list[str]
    """The row of each sample, which the compared record says."""


class Pairs(NamedTuple):
    """What is compared, and what has no counterpart."""

    pairs: list[Pair]
    only_baseline: list[str]
    """Ids of prompts."""
    only_compared: list[str]
    samples: int
    """Samples without a counterpart, of prompts that are on both sides."""
    reworded: list[str]
    """Ids of prompts with another text in the baseline."""


class Comparison:
    """Takes the baseline's records, then the others as they pass, and compares them.

    Args:
        by: the field whose values have rows of their own.

    Raises:
        DataError: as `collected`.
    """

    def __init__(self, baseline: Iterable[Record], by: str) -> None:
        self._by = by
        self._sides: tuple[Side, Side] = {}, {}
        self._pairs: Pairs | None = None
        deque(collected(baseline, self._sides[0], by), maxlen=0)

    def collected(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records, as they are kept for the comparison."""
        return collected(records, self._sides[1], self._by)

    @property
    def pairs(self) -> Pairs:
        """What is compared, after all records have passed; raises DataError if it is nothing."""
        if self._pairs is None:
            self._pairs = paired(*self._sides)
        return self._pairs

    def rows(
        self, ks: Sequence[int], confidence: float, comparing: Comparing
    ) -> list[dict[str, Any]]:
        """Rows of `comparison_rows`; says on stderr what has no counterpart."""
        for line in unpaired(self.pairs):
            print(f"dlmctl: {line}", file=sys.stderr)
        return comparison_rows(self.pairs, ks, confidence, comparing)


def collected(records: Iterable[Record], side: Side, by: str) -> Iterator[Record]:
    """The records, whose samples are added to `side` as they pass; those with an error are not.

    A record without `sample` has as number its place among those of its prompt.

    Raises:
        DataError: a record has no id, or the same sample was there before.
    """
    for record in records:
        if "error" not in record:
            identity = jsonl.field(record, "id", (str, int), "a comparison pairs prompts by it")
            key = str(record.get("task") or ""), identity
            text = jsonl.dump([record.get("prompt"), record.get("messages")])
            prompt = side.setdefault(key, Prompt(blake2b(text, digest_size=8).digest()))
            number = len(prompt.samples)
            if record.get("sample") is not None:
                number = jsonl.field(record, "sample", int)
            if number in prompt.samples:
                raise DataError(
                    f"sample {number} of prompt {identity} was there before; a comparison takes "
                    "one evaluation a side",
                    record.where,
                )
            prompt.samples[number] = sample(record), label(record, by)
        yield record


def paired(baseline: Side, compared: Side) -> Pairs:
    """Pair two sides; raises DataError if they have no sample in common."""
    pairs, reworded, alone = [], [], 0
    for key in sorted(compared, key=str):  # so that the order of the files does not matter
        prompt = compared[key]
        other = baseline.get(key)
        numbers = sorted(prompt.samples.keys() & other.samples.keys()) if other else []
        if other is None or not numbers:
            continue
        alone += len(prompt.samples) + len(other.samples) - 2 * len(numbers)
        if prompt.text != other.text:
            reworded.append(str(key[1]))
        pairs.append(
            Pair(
                key,
                [other.samples[n][0] for n in numbers],
                [prompt.samples[n][0] for n in numbers],
                [prompt.samples[n][1] for n in numbers],
            )
        )
    both = {pair.key for pair in pairs}
    gone, new = ([str(key[1]) for key in side if key not in both] for side in (baseline, compared))
    if not pairs:
        begin = [f"{len(ids)}" + (f", the first {ids[0]}" if ids else "") for ids in (gone, new)]
        raise DataError(
            f"the baseline and the records have no prompt in common by task, id and sample "
            f"(baseline: {begin[0]}; records: {begin[1]})"
        )
    return Pairs(pairs, gone, new, alone, reworded)


def unpaired(pairs: Pairs) -> Iterator[str]:
    """What is left out of a comparison, and what looks wrong with it, a line each."""
    for ids, what in (
        (pairs.only_baseline, "only in the baseline, and left out"),
        (pairs.only_compared, "not in the baseline, and left out"),
        (pairs.reworded, "asked in other words in the baseline"),
    ):
        if ids:
            more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
            number = "1 prompt is" if len(ids) == 1 else f"{len(ids)} prompts are"
            yield f"{number} {what}: {', '.join(ids[:NAMED])}{more}"
    if pairs.samples:
        number = "1 sample" if pairs.samples == 1 else f"{pairs.samples} samples"
        has = "has no counterpart, and is" if pairs.samples == 1 else "have no counterpart, and are"
        yield f"{number} of prompts of both {has} left out"


def comparison_rows(
    pairs: Pairs, ks: Sequence[int], confidence: float, comparing: Comparing
) -> list[dict[str, Any]]:
    """A row for each measure, of each label and of all unless there is one label.

    Args:
        ks: k of pass@k.
        confidence: of the intervals; `change` is significant if the interval does not contain 0
            and p is at most 1 - confidence.
    """
    labels = list(dict.fromkeys(name for pair in pairs.pairs for name in pair.labels))
    parts = {name: [_of(pair, name) for pair in pairs.pairs if name in pair.labels]
             for name in labels}  # fmt: skip
    if len(labels) > 1:
        parts["all"] = pairs.pairs
    rows = [
        {"task": name, **row}
        for name, part in parts.items()
        for row in _measured(part, ks, confidence, comparing)
    ]
    counts = {
        "baseline": len(pairs.only_baseline),
        "records": len(pairs.only_compared),
        "samples": pairs.samples,
    }
    for row in rows:
        if row["task"] == rows[-1]["task"] and any(counts.values()):
            row["unpaired"] = counts
    return rows


def _of(pair: Pair, name: str) -> Pair:
    """The samples of a pair that count in one row."""
    where = [number for number, label in enumerate(pair.labels) if label == name]
    return pair._replace(
        baseline=[pair.baseline[n] for n in where],
        compared=[pair.compared[n] for n in where],
        labels=[name] * len(where),
    )


def _measured(
    pairs: Sequence[Pair], ks: Sequence[int], confidence: float, comparing: Comparing
) -> Iterator[dict[str, Any]]:
    before = [ratios(pair.baseline, ks) for pair in pairs]
    after = [ratios(pair.compared, ks) for pair in pairs]
    names = [
        name
        for name in dict.fromkeys(name for sums in after for name in sums)
        if any(_weighs(a, name) and _weighs(b, name) for a, b in zip(before, after, strict=True))
    ]
    # [P, M, side, numerator and denominator]; zeros if a prompt lacks the measure on a side
    sums = np.zeros((len(pairs), len(names), 2, 2))
    for p, both in enumerate(zip(before, after, strict=True)):
        for m, name in enumerate(names):
            if all(_weighs(side, name) for side in both):
                sums[p, m] = [side[name] for side in both]
    values = _values(sums.sum(0))  # [M, side]
    low, high = _interval(sums, confidence, comparing)
    chances = _exchanged(sums, comparing)
    for m, name in enumerate(names):
        difference = float(values[m, 1] - values[m, 0])
        row = {
            "measure": name,
            "prompts": int((sums[:, m, 0, 1] > 0).sum()),
            "baseline": float(values[m, 0]),
            "value": float(values[m, 1]),
            "difference": difference,
            "interval": [float(low[m]), float(high[m])],
            "p": float(chances[m]),
        }
        clear = (low[m] > 0 or high[m] < 0) and chances[m] <= 1 - confidence + ROUNDING
        row["change"] = "unclear"
        if clear:
            row["change"] = "worse" if (difference < 0) != (name in COSTS) else "better"
        if name == "accuracy":
            lost, gained = changed(pairs)
            row |= {"lost": len(lost), "gained": len(gained)}
            row["mcnemar"] = mcnemar(len(lost), len(gained))
        yield row


def changed(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Prompts that were right and are not, and those that were not and are."""
    lost: list[Pair] = []
    gained: list[Pair] = []
    for pair in pairs:
        before, after = mostly_right(pair.baseline), mostly_right(pair.compared)
        if before != after:
            (lost if before else gained).append(pair)
    return lost, gained


def mostly_right(samples: Sequence[Sample]) -> bool:
    """Whether more than half of them are right."""
    return 2 * sum(one.correct for one in samples) > len(samples)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided p of McNemar's exact test: of a fair coin, `lost + gained` times."""
    count, term, total = lost + gained, 1, 0
    if lost == gained:
        return 1.0
    for i in range(min(lost, gained) + 1):
        total += term
        term = term * (count - i) // (i + 1)
    return 2 * total / 2**count


def _weighs(sums: dict[str, tuple[float, float]], name: str) -> bool:
    return name in sums and sums[name][1] > 0


def _values(sums: np.ndarray) -> np.ndarray:
    """Numerators over denominators, [..., 2] to [...]; nan if there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def _interval(
    sums: np.ndarray, confidence: float, comparing: Comparing
) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the differences of each measure, [M] each, over resamples of prompts."""
    prompts = len(sums)
    generator = np.random.default_rng(comparing.seed)
    differences = []
    for many in _blocks(comparing.bootstrap, prompts):
        places = generator.integers(prompts, size=(many, prompts))
        places += np.arange(many)[:, None] * prompts
        counts = np.bincount(places.ravel(), minlength=many * prompts).reshape(many, prompts)
        drawn = _values(np.tensordot(counts.astype(float), sums, 1))  # [R, M, side]
        differences.append(drawn[..., 1] - drawn[..., 0])
    tail = (1 - confidence) / 2
    # A resample may have no prompt with a measure that few have.
    low, high = np.nanquantile(np.concatenate(differences), [tail, 1 - tail], axis=0)
    return low, high


def _exchanged(sums: np.ndarray, comparing: Comparing) -> np.ndarray:
    """p [M] of exchanging the sides of prompts: of all exchanges, or of random ones and none."""
    prompts, bits = len(sums), len(sums).bit_length()
    both, half = sums.sum(2) / 2, (sums[:, :, 1] - sums[:, :, 0]) / 2  # [P, M, 2]
    total = both.sum(0)

    def differences(signs: np.ndarray) -> np.ndarray:
        apart = np.tensordot(signs, half, 1)  # [R, M, 2]
        return np.abs(_values(total + apart) - _values(total - apart))

    observed = differences(np.ones((1, prompts)))[0]
    least = observed - ROUNDING * np.maximum(1.0, observed)
    every = prompts < 63 and 2**prompts <= comparing.bootstrap
    generator = np.random.default_rng(comparing.seed)
    hits, count, at = np.zeros(sums.shape[1]), 0, 0
    for many in _blocks(2**prompts if every else comparing.bootstrap, prompts + bits):
        if every:
            numbers = np.arange(at, at + many)[:, None]
            signs = 1.0 - 2.0 * ((numbers >> np.arange(prompts)) & 1)
        else:
            signs = 1.0 - 2.0 * generator.integers(2, size=(many, prompts))
        hits += (differences(signs) >= least).sum(0)
        count, at = count + many, at + many
    return hits / count if every else (hits + 1) / (count + 1)


def _blocks(count: int, width: int) -> Iterator[int]:
    """Numbers of rows of this width that are drawn at once, `count` in all."""
    while count > 0:
        many = min(count, max(1, DRAWS // width))
        yield many
        count -= many
