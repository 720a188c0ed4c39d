"""Accuracy, pass@k and averages over verified records, in one pass and constant memory.

accuracy   share of right completions; its interval is Wilson's, with the number of completions
           replaced by the number of independent ones that would vary as much, because samples of
           one prompt are not independent                 (cluster-robust variance by prompt)
pass@k     1 - C(n-c, k) / C(n, k), averaged over prompts with n >= k samples, c of them right
           (Chen et al. 2021, arXiv 2107.03374: unbiased for "one of k is right")
within     correlation of being right with a verifier's number, both as differences from the mean
           of their prompt: whether, among the samples of a prompt, more of one goes with the other
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from dlmctl.records.groups import groups
from dlmctl.records.jsonl import Record, object_field
from dlmctl.report.image_free import IMAGE_FREE


def is_correct(record: Record) -> bool:
    """Whether all verifiers that judge correctness say so; without any, whether the reward is 1."""
    verdicts = object_field(record, "verdict").values()
    judgements = [v["correct"] for v in verdicts if isinstance(v, dict) and "correct" in v]
    return all(judgements) if judgements else _number(record.get("reward")) >= 1.0


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, include a right one."""
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def wilson_interval(share: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `count` independent trials."""
    if count <= 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


class Sample(NamedTuple):
    """What the statistics need of a verified record."""

    correct: bool
    measures: dict[str, tuple[float, float]]
    """Value and weight of everything that is averaged."""


def sample(record: Record) -> Sample:
    """The sample that a verified record holds."""
    return Sample(is_correct(record), _measures(record))


def ratios(group: Sequence[Sample], ks: Sequence[int]) -> dict[str, tuple[float, float]]:
    """What the samples of one prompt add to numerator and denominator of each measure."""
    n, c = len(group), sum(one.correct for one in group)
    sums: dict[str, tuple[float, float]] = {"accuracy": (c, n)}
    sums |= {f"pass@{k}": (pass_at_k(n, c, k), 1) for k in ks if n >= k}
    for one in group:
        for name, (value, weight) in one.measures.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + value, before[1] + weight
    return sums


class Tally:
    """Running sums over the groups of one task."""

    def __init__(self, ks: Sequence[int], within: Sequence[str] = ()) -> None:
        self.ks = ks
        self._within = {name: [0.0, 0.0, 0.0] for name in within}
        """Sums of c c, x x and c x over the samples, as differences from the mean of their prompt,
        c being whether a sample is right and x what the verifier says."""
        self.prompts = self.completions = self.correct = 0
        self._squares = self._products = self._counts_squared = 0.0
        self._sums: dict[str, list[float]] = {f"pass@{k}": [0.0, 0.0] for k in ks}

    def add(self, group: Sequence[Record]) -> None:
        """Count the samples of one prompt."""
        samples = [sample(record) for record in group]
        n, c = len(group), sum(one.correct for one in samples)
        self.prompts += 1
        self.completions += n
        self.correct += c
        self._squares += c * c
        self._products += c * n
        self._counts_squared += n * n
        for name, moments in self._within.items():
            said = [object_field(record, "rewards").get(name) for record in group]
            values = [float(value) for value in said if isinstance(value, (int, float))]
            if len(values) < len(group):
                continue  # this verifier did not judge all of them
            right = [float(one.correct) for one in samples]
            for a, b in zip(_differences(right), _differences(values), strict=True):
                moments[0] += a * a
                moments[1] += b * b
                moments[2] += a * b
        for name, (value, weight) in ratios(samples, self.ks).items():
            entry = self._sums.setdefault(name, [0.0, 0.0])
            entry[0] += value
            entry[1] += weight

    def row(self, task: str, confidence: float) -> dict[str, Any]:
        """The statistics as a record."""
        accuracy = self.correct / self.completions if self.completions else None
        row: dict[str, Any] = {
            "task": task,
            "prompts": self.prompts,
            "completions": self.completions,
            "accuracy": accuracy,
            "interval": None,
        }
        if accuracy is not None:
            row["interval"] = list(wilson_interval(accuracy, self._independent(), confidence))
        averaged = {name: value / weight for name, (value, weight) in self._sums.items() if weight}
        row |= {name: value for name, value in averaged.items() if name != "accuracy"}
        for name, (c, x, both) in self._within.items():
            row[f"within.{name}"] = both / math.sqrt(c * x) if c * x else None
        return row

    def _independent(self) -> float:
        """Number of independent completions that would vary as much as these."""
        p = self.correct / self.completions
        if self.prompts < 2 or self.completions == self.prompts:
            return float(self.completions if self.prompts > 1 else self.prompts)
        spread = self._squares - 2 * p * self._products + p * p * self._counts_squared
        variance = self.prompts / (self.prompts - 1) * spread / self.completions**2
        if p in (0.0, 1.0):
            # If all are right, or all wrong, nothing shows how alike samples of a prompt are.
            return float(self.prompts)
        return min(float(self.completions), p * (1 - p) / max(variance, 1e-12))


def tally(
    records: Iterable[Record],
    by: str,
    ks: Sequence[int],
    confidence: float,
    within: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """One row per value of `by` (task, model, round), and one for all unless there is one value."""
    tallies: dict[str, Tally] = {}
    total, errors = Tally(ks, within), 0

    def counted() -> Iterable[Record]:
        nonlocal errors
        for number, record in enumerate(records):
            errors += "error" in record
            record.setdefault("id", f"record-{number}")  # a prompt of its own
            yield record

    for group in groups(counted()):
        for name in dict.fromkeys(label(record, by) for record in group):
            labelled = [record for record in group if label(record, by) == name]
            tallies.setdefault(name, Tally(ks, within)).add(labelled)
        total.add(group)
    rows = [t.row(name, confidence) for name, t in tallies.items()]
    if len(rows) != 1:
        rows.append(total.row("all", confidence))
    if errors:
        rows[-1]["errors"] = errors
    return rows


def label(record: Record, by: str) -> str:
    """The row that a record counts in: its value of a field, or of that field of `rollout`."""
    value = record.get(by, object_field(record, "rollout").get(by))
    return "-" if value is None else str(value)


def _measures(record: Record) -> dict[str, tuple[float, float]]:
    """Value and weight of everything that is averaged."""
    measures: dict[str, tuple[float, float]] = {}
    for verdict in object_field(record, "verdict").values():
        if isinstance(verdict, dict) and "stored" in verdict:
            measures["cells"] = (_number(verdict["stored"]), _number(verdict.get("empty")))
            whole = verdict["stored"] == verdict.get("empty") and bool(verdict.get("correct"))
            measures["stored"] = (whole, 1)
    if isinstance(record.get("reward"), (int, float)):
        measures["reward"] = (record["reward"], 1)
    rewards = object_field(record, "rewards")
    if len(rewards) > 1:
        measures |= {
            f"rewards.{name}": (value, 1)
            for name, value in rewards.items()
            if isinstance(value, (int, float))
        }
    if IMAGE_FREE in record:
        measures[IMAGE_FREE] = (_number(record[IMAGE_FREE]), 1)
    rollout, ids = object_field(record, "rollout"), object_field(record, "tokens").get("completion")
    length = _number(rollout.get("length")) or (len(ids) if isinstance(ids, list) else 0)
    if length:
        measures["tokens"] = (length, 1)
    if "nfe" in rollout:
        measures["nfe"] = (_number(rollout["nfe"]), 1)
    if "finish" in rollout:
        measures["finished"] = (rollout["finish"] == "eos", 1)
    return measures


def _differences(values: Sequence[float]) -> list[float]:
    """Of each from their mean."""
    mean = sum(values) / len(values)
    return [value - mean for value in values]


def _number(value: Any) -> float:
    """A number of a record; anything else counts as 0."""
    return value if isinstance(value, (int, float)) else 0.0
