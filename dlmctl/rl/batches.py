"""Batches of one optimizer step: whole groups, and where a round of a training loop ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError, TryAgainError
from dlmctl.records.groups import group_key, group_size
from dlmctl.records.jsonl import Record, object_field


class StepBatch(NamedTuple):
    """What one optimizer step sees."""

    groups: list[list[Record]]
    partial: int
    """Groups that lack some of the samples that `rollout` drew for them."""
    finished_round: int | None
    """The round that is complete with this batch."""

    @property
    def rows(self) -> list[Record]:
        """The records, group by group."""
        return [record for group in self.groups for record in group]

    @property
    def in_round(self) -> bool:
        """Whether it is part of a round of a training loop."""
        return any("round" in object_field(record, "rollout") for record in self.rows)


def packed(batch: StepBatch) -> dict[str, Any]:
    """A batch as JSON, for other ranks."""
    groups = [[[record.where, record] for record in group] for group in batch.groups]
    return {**batch._asdict(), "groups": groups}


def unpacked(value: dict[str, Any]) -> StepBatch:
    """The batch that `packed` made this of."""
    return StepBatch(**{**value, "groups": [[_record(*r) for r in g] for g in value["groups"]]})


def _record(where: str, fields: dict[str, Any]) -> Record:
    record = Record(fields)
    record.where = where
    return record


class CutRoundError(TryAgainError):
    """The stream of a training loop ended within a round (exit 75)."""

    def __init__(self, number: int, seen: int, size: int) -> None:
        super().__init__(
            f"the stream ended within round {number}, after {seen} of {size} completions; the "
            "same line does this round again"
        )


def step_batches(records: Iterable[Record], prompts_per_step: int) -> Iterator[StepBatch]:
    """Collect neighbouring groups; a batch leaves with `prompts_per_step` of them, or at round end.

    A group is known to be whole once it has as many samples as `rollout` says it has, so that a
    step need not wait for the next group. Records with an `error` are left out and counted as seen.
    """
    groups: list[list[Record]] = []
    seen_in_round = 0
    place: dict[str, Any] = {}
    for record in records:
        place = object_field(record, "rollout")
        seen_in_round += 1
        round_done = "round_size" in place and seen_in_round >= place["round_size"]
        if "error" not in record:
            if not groups or _starts_group(groups[-1], record):
                if len(groups) == prompts_per_step:
                    yield _batch(groups, None)
                    groups = []
                groups.append([])
            groups[-1].append(record)
        if round_done:
            yield _batch(groups, place.get("round"))
            groups, seen_in_round = [], 0
        elif len(groups) == prompts_per_step and len(groups[-1]) == group_size(groups[-1][0]):
            yield _batch(groups, None)
            groups = []
    if seen_in_round and "round_size" in place:
        raise CutRoundError(place["round"], seen_in_round, place["round_size"])
    if groups:
        yield _batch(groups, None)


def _starts_group(group: list[Record], record: Record) -> bool:
    return group_key(group[0]) != group_key(record) or len(group) == group_size(group[0])


def _batch(groups: list[list[Record]], finished_round: int | None) -> StepBatch:
    partial = sum(len(group) < (group_size(group[0]) or 0) for group in groups)
    return StepBatch(groups, partial, finished_round)


def sampled_from(record: Record) -> str | None:
    """Revision of the weights that a completion was sampled from, where it says so."""
    revision = object_field(record, "rollout").get("revision")
    if revision is not None and not isinstance(revision, str):
        kind = type(revision).__name__
        raise DataError(f"field 'rollout.revision' is {kind}, expected str", record.where)
    return revision


def max_lag(record: Record) -> int:
    """Rounds that the weights may be old which a completion was sampled from."""
    lag = object_field(record, "rollout").get("max_lag", 0)
    if type(lag) is not int or lag < 0:
        raise DataError(
            f"field 'rollout.max_lag' is {lag!r}, expected a number of rounds", record.where
        )
    return lag


def check_on_policy(batch: StepBatch, revisions: Sequence[str], trained_rounds: int) -> None:
    """Refuse records of a training loop that were not sampled from the weights of this run.

    Args:
        revisions: hashes of the weights after every round, the newest last.
        trained_rounds: rounds that the run has been trained on.

    Raises:
        DataError: the round is not the next one, or its weights are more than `max_lag` rounds old.
    """
    for record in batch.rows:
        place = object_field(record, "rollout")
        if "round" not in place:
            continue
        if place["round"] != trained_rounds:
            raise DataError(
                f"a completion of round {place['round']}; this run has been trained on "
                f"{trained_rounds} rounds and goes on with round {trained_rounds} (--any-policy "
                "takes it all the same)",
                record.where,
            )
        lag, revision = max_lag(record), sampled_from(record)
        if revision not in revisions[-(lag + 1) :]:
            raise DataError(
                f"sampled from weights {revision}, which are not those of this run "
                f"(now {revisions[-1]}) within {lag} rounds (--any-policy takes it all the same)",
                record.where,
            )
