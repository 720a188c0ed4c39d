"""Batches of one optimizer step: whole groups, and where a round of a training loop ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError, TryAgainError
from dlmctl.records.groups import (
    group_size,
    is_sample,
    is_whole,
    round_size,
    whole_groups,
    without_errors,
)
from dlmctl.records.jsonl import Record, object_field


class StepBatch(NamedTuple):
    """The records of one optimizer step."""

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
    """The inverse of `packed`."""
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
            "same command takes this round again"
        )


def step_batches(records: Iterable[Record], prompts_per_step: int) -> Iterator[StepBatch]:
    """The batches of `whole_batches`, of the records without an `error`.

    Raises:
        CutRoundError: the last round of a training loop lacks completions.
    """
    for batch, finished_round in whole_batches(records, prompts_per_step, cut_rounds=False):
        groups = list(without_errors(batch))
        partial = sum(len(group) < (group_size(group[0]) or 0) for group in groups)
        yield StepBatch(groups, partial, finished_round)


def whole_batches(
    records: Iterable[Record], prompts_per_step: int, cut_rounds: bool
) -> Iterator[tuple[list[list[Record]], int | None]]:
    """Collect neighbouring groups; a batch ends with `prompts_per_step` of them, or with its round.

    Each batch comes with the round that it completes. The groups are those of `whole_groups`: a
    record with an `error` counts as seen, and a group that contains nothing else is no prompt.

    Args:
        cut_rounds: the last round may lack completions.

    Raises:
        CutRoundError: it lacks some although `cut_rounds` is False.
    """
    batch: list[list[Record]] = []
    prompts = seen = 0
    round_: Any = None
    size: int | None = None
    for group in whole_groups(records):
        if is_sample(group[0]):
            place = object_field(group[0], "rollout")
            if place.get("round") != round_:
                if batch:
                    yield batch, None
                batch, prompts, seen = [], 0, 0
            round_, size = place.get("round"), round_size(group[0])
        if prompts == prompts_per_step:
            yield batch, None
            batch, prompts = [], 0
        batch.append(group)
        prompts += any(without_errors([group]))
        seen += len(group)
        if size is not None and seen >= size:
            yield batch, round_
            batch, prompts, seen = [], 0, 0
        elif prompts == prompts_per_step and (size is None or is_whole(group)):
            yield batch, None
            batch, prompts = [], 0
    if seen and size is not None and not cut_rounds:
        raise CutRoundError(round_, seen, size)
    if batch:
        yield batch, None


def of_one_model(records: Iterable[Record], model: str | None) -> Iterator[Record]:
    """The records, if all that name a model in `rollout` name this one.

    Records of a training loop are left to `check_on_policy`.

    Raises:
        DataError: a record was sampled from another model.
    """
    for record in records:
        place = {} if "error" in record else object_field(record, "rollout")
        if "round" not in place and place.get("model", model) != model:
            before = "of no model" if model is None else f"from {model}"
            raise DataError(
                f"sampled from {place['model']}, and the records before it {before}: say with "
                "--model which one is trained",
                record.where,
            )
        yield record


class Source(NamedTuple):
    """What a record was sampled from, as `rollout` wrote it."""

    model: str | None
    revision: str | None


def source_of(record: Record) -> Source:
    """Raises DataError if these fields of `rollout` are not texts."""
    return Source(_name(record, "model"), _name(record, "revision"))


def sampled_from(record: Record) -> str | None:
    """Revision of the weights that a completion was sampled from, if it has one."""
    return _name(record, "revision")


def _name(record: Record, field: str) -> str | None:
    name = object_field(record, "rollout").get(field)
    if name is not None and not isinstance(name, str):
        kind = type(name).__name__
        raise DataError(f"field 'rollout.{field}' is {kind}, expected str", record.where)
    return name


def other_distribution(record: Record) -> str | None:
    """How a completion was sampled, if not from the model's own distribution, which is scored.

    At temperature 1 and without --top-p and --top-k, sampling and scoring have one policy.
    """
    place = object_field(record, "rollout")
    settings = {"temperature": 1, "top_p": 1, "top_k": 0}
    sampler = place.get("sampler")
    used = {**(sampler if isinstance(sampler, dict) else {}), **place}
    changed = [
        f"{name.replace('_', '-')} {used[name]}"
        for name, neutral in settings.items()
        if used.get(name) not in (None, neutral)
    ]
    return " and ".join(changed) or None


def max_lag(record: Record) -> int:
    """How many rounds old the weights may be that a completion was sampled from."""
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
                f"{trained_rounds} rounds and resumes with round {trained_rounds} (--any-policy "
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
