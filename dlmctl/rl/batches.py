"""Batches of one optimizer step: whole groups, and where a round of a training loop ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from dlmctl.records.groups import group_key, group_size
from dlmctl.records.jsonl import Record


class StepBatch(NamedTuple):
    """What one optimizer step sees."""

    groups: list[list[Record]]
    partial: int
    """Groups that lack some of the samples that `rollout` drew for them."""
    finished_round: int | None
    """The round that is complete with this batch."""


def step_batches(records: Iterable[Record], prompts_per_step: int) -> Iterator[StepBatch]:
    """Collect neighbouring groups; a batch leaves with `prompts_per_step` of them, or at round end.

    A group is known to be whole once it has as many samples as `rollout` says it has, so that a
    step need not wait for the next group. Records with an `error` are left out and counted as seen.
    """
    groups: list[list[Record]] = []
    seen_in_round = 0
    for record in records:
        place = record.get("rollout") or {}
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
    if groups:
        yield _batch(groups, None)


def _starts_group(group: list[Record], record: Record) -> bool:
    return group_key(group[0]) != group_key(record) or len(group) == group_size(group[0])


def _batch(groups: list[list[Record]], finished_round: int | None) -> StepBatch:
    partial = sum(len(group) < (group_size(group[0]) or 0) for group in groups)
    return StepBatch(groups, partial, finished_round)
