"""The stage `update`: verified records in, one metrics record per optimizer step out.

A step is taken for every batch of prompts. In a training loop a checkpoint is published at the end
of each round; an incomplete round leaves none. Otherwise a checkpoint is published every
`save_every` steps and at the end, also if the stream fails, so that no step is lost; but not if the
command is interrupted.

Under torchrun the first rank reads the stream and tells the others each batch; all of them take
the step, and the first writes its metrics.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import count
from typing import Any

import torch

from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.models.allocator import release_cached_memory
from dlmctl.records.errors import UsageError
from dlmctl.records.interrupts import stopping
from dlmctl.records.jsonl import Record, each
from dlmctl.rl.batches import (
    StepBatch,
    check_on_policy,
    other_distribution,
    packed,
    step_batches,
    unpacked,
)
from dlmctl.rl.objectives.scores import Objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.rl.samplers import Samplers, reference_log_probs
from dlmctl.rl.srpo.credit_metrics import credit_metrics
from dlmctl.rl.supervised import supervised_gradient, with_completion_ids
from dlmctl.settings.masks import Fill
from dlmctl.train.distributed import broadcast_items, is_first, may_save
from dlmctl.train.run import Run

Gradients = Callable[[StepBatch], Iterator[dict[str, Any]]]
"""Accumulates the gradient of each step on a batch in turn, and yields its metrics."""


def update_policy(
    records: Iterable[Record],
    run: Run,
    objective: Objective,
    batching: Batching,
    prompts_per_step: int,
    batch_size: int,
    save_every: int,
    keep: int,
    any_policy: bool = False,
    credit_cosine: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Reinforcement learning: one step, or `inner` of them, for each batch of groups.

    Args:
        credit_cosine: every how many steps the gradient is compared with the one without token
            weights.
    """
    reference = Reference(
        run.progress.reference_revision,
        lambda examples: reference_log_probs(run, examples, batch_size),
    )
    samplers = Samplers(run, batch_size)
    recorded = objective.recipe.sampled_old and not run.policy.diffusion
    noted: set[str] = set()

    def gradients(batch: StepBatch) -> Iterator[dict[str, Any]]:
        if not any_policy:
            check_on_policy(batch, run.revisions, run.progress.round)
        if batch.partial and is_first():
            print(
                f"dlmctl: {batch.partial} groups are not whole; their weights do not sum to zero",
                file=sys.stderr,
            )
        if objective.needs == "ratios" and not recorded:
            samplers.keep(batch)
        _note_distribution(batch, noted)
        compare = credit_cosine is not None and run.progress.step % credit_cosine == 0
        for metrics in policy_gradients(
            run.policy, reference, batch.groups, objective, batching, batch_size, samplers, compare
        ):
            credit = credit_metrics(batch.rows) if objective.recipe.token_weights else {}
            yield {**_rewards(batch), **metrics, **credit}

    batches = step_batches(records, prompts_per_step)
    return take_steps(batches, run, gradients, save_every, keep, batching.inner)


def update_supervised(
    records: Iterable[Record],
    run: Run,
    plan: MaskPlan,
    records_per_step: int,
    batch_size: int,
    fill: Fill | None,
    save_every: int,
    keep: int,
    anneal_attention: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Supervised fine-tuning: one step for every `records_per_step` completions."""

    def gradients(batch: StepBatch) -> Iterator[dict[str, Any]]:
        yield supervised_gradient(
            run.policy, batch.rows, plan, run.progress.step, batch_size, anneal_attention
        )

    prepared = each(records, lambda record: with_completion_ids(record, run.policy, fill))
    batches = plain_batches(prepared, records_per_step, run.passed)
    return take_steps(batches, run, gradients, save_every, keep)


def _note_distribution(batch: StepBatch, noted: set[str]) -> None:
    """Say once for each way in which completions were sampled otherwise than they are scored."""
    for way in {way for record in batch.rows if (way := other_distribution(record))} - noted:
        noted.add(way)
        if is_first():
            print(
                f"dlmctl: completions were sampled with {way}, and are scored with temperature 1 "
                "and all tokens: off-policy ('dlmctl rollout --temperature 1' is on-policy)",
                file=sys.stderr,
            )


def _rewards(batch: StepBatch) -> dict[str, float]:
    """Means over the batch; nothing for preferences, which have no rewards of their own."""
    if any("preference" in record for record in batch.rows):
        return {}
    rewards = [float(record.get("reward", 0.0)) for record in batch.rows]
    return {
        "reward": sum(rewards) / len(rewards),
        "accuracy": sum(reward >= 1.0 for reward in rewards) / len(rewards),
    }


def plain_batches(records: Iterable[Record], size: int, first: int = 0) -> Iterator[StepBatch]:
    """Batches of records that form no groups; each record is a group of its own.

    Args:
        first: number of the first record, for the ids of records without one.
    """
    rows: list[list[Record]] = []
    for number, record in enumerate(records, first):
        if "error" not in record:
            record.setdefault("id", f"record-{number}")
            rows.append([record])
        if len(rows) == size:
            yield StepBatch(rows, 0, None)
            rows = []
    if rows:
        yield StepBatch(rows, 0, None)


def take_steps(
    batches: Iterator[StepBatch],
    run: Run,
    gradients: Gradients,
    save_every: int,
    keep: int,
    inner: int = 1,
) -> Generator[dict[str, Any], None, None]:
    """Take the steps on all batches, and save and evaluate checkpoints.

    Args:
        inner: the most steps on a batch.

    Yields:
        The metrics of each step, and those of each evaluation.

    Raises:
        UsageError: there was no batch.
        DataError: an evaluation failed.
    """
    taken, within_round, within_batch = 0, False, False
    end = yield from _evaluation(run)
    try:
        for batch in broadcast_items(batches, packed, unpacked) if end is None else ():
            if batch.groups:
                within_round = batch.in_round
                for step, record in enumerate(_batch_steps(batch, run, gradients, inner), 1):
                    taken += 1
                    within_batch = step < inner
                    yield record
                within_batch = False
            if batch.finished_round is not None:
                run.progress.round = batch.finished_round + 1
                within_round = False
                # Before the checkpoint is there, for which the sampler waits.
                release_cached_memory(run.policy.device)
                run.save(keep)
            elif not within_round and run.progress.step - run.saved_step >= save_every:
                run.save(keep)
            else:
                continue
            end = yield from _evaluation(run)
            if end is not None:
                break
    finally:
        # An incomplete round or batch is trained again from the checkpoint before it. After an
        # interrupt there is no time to save. A step whose metrics could not be written is taken
        # again.
        unsaved = run.progress.step != run.saved_step and not (within_round or within_batch)
        logged = run.logged_step == run.progress.step
        if unsaved and not stopping() and logged and may_save():
            run.save(keep)
    if end is None:
        end = yield from _evaluation(run, last=True)
    if end is None and not taken:
        raise UsageError("no records came in; nothing was trained")
    if end is not None and is_first():
        print(f"dlmctl: {run.directory}: {end}", file=sys.stderr)


def _evaluation(run: Run, last: bool = False) -> Generator[dict[str, Any], None, str | None]:
    """Yield the evaluation of the newest checkpoint if its turn has come; returns why to end."""
    record, end = run.evaluate(last)
    if record is not None:
        yield record
    return end


def _batch_steps(
    batch: StepBatch, run: Run, gradients: Gradients, inner: int
) -> Iterator[dict[str, Any]]:
    """The steps on a batch, each with its metrics record."""
    rows = batch.rows
    tokens = sum(_tokens(record) for record in rows)
    steps, begun = gradients(batch), time.monotonic()
    for number in count(1):
        with run.precision():
            metrics = next(steps, None)
        if metrics is None:
            return
        stepped = run.step()
        if number == 1:  # a batch that failed before its first step is not counted
            run.progress.completions += len(rows)
            run.progress.tokens += tokens
        seconds = time.monotonic() - begun
        record = {
            "algo": run.progress.algo,
            "run": run.directory.path.name,
            "step": run.progress.step,
            **({} if batch.finished_round is None else {"round": batch.finished_round}),
            "prompts": len(batch.groups),
            "completions": len(rows),
            **metrics,
            **stepped,
            "skipped": run.progress.skipped,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_mb": _peak_memory(run.policy.device) / 2**20,
        }
        run.directory.append(record)
        run.logged_step = run.progress.step
        if number == 1 and run.keep_samples is not None and is_first():
            current = run.progress.round if batch.in_round else None
            run.keep_samples(batch.groups, run.progress.step, current)
        yield record
        begun = time.monotonic()


def _tokens(record: Record) -> int:
    return len((record.get("tokens") or {}).get("completion") or record.get("completion", ""))


def _peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA what torch allocated at most, elsewhere the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
