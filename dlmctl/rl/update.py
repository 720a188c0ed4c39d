"""The stage `update`: verified records in, one metrics record per optimizer step out.

A step is taken for every batch of prompts; a checkpoint is published at the end of a round, every
so many steps, and at the end, also when the stream fails, so that no step is lost.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record, dump
from dlmctl.rl.batches import StepBatch, step_batches
from dlmctl.rl.policy_gradient import Objective, Reference, policy_gradient
from dlmctl.rl.supervised import supervised_gradient, with_completion_ids
from dlmctl.training.run import Run


def update_policy(
    records: Iterable[Record],
    run: Run,
    objective: Objective,
    prompts_per_step: int,
    batch_size: int,
    save_every: int,
    keep: int,
) -> Iterator[dict[str, Any]]:
    """Reinforcement learning: one step for each batch of groups."""
    reference = Reference(
        run.progress.reference_revision, lambda examples: run.reference_scores(examples, batch_size)
    )

    def gradient(batch: StepBatch) -> dict[str, Any]:
        if batch.partial:
            print(
                f"dlmctl: {batch.partial} groups are not whole; their weights do not sum to zero",
                file=sys.stderr,
            )
        metrics = policy_gradient(run.policy, reference, batch.groups, objective, batch_size)
        rewards = [float(r.get("reward", 0.0)) for group in batch.groups for r in group]
        return {
            "reward": sum(rewards) / len(rewards),
            "accuracy": sum(reward >= 1.0 for reward in rewards) / len(rewards),
            **metrics,
        }

    return _steps(step_batches(records, prompts_per_step), run, gradient, save_every, keep)


def update_supervised(
    records: Iterable[Record],
    run: Run,
    plan: MaskPlan,
    records_per_step: int,
    batch_size: int,
    fill_to: int | None,
    save_every: int,
    keep: int,
) -> Iterator[dict[str, Any]]:
    """Supervised fine-tuning: one step for every `records_per_step` completions."""

    def gradient(batch: StepBatch) -> dict[str, Any]:
        rows = [with_completion_ids(r, run.policy, fill_to) for g in batch.groups for r in g]
        return supervised_gradient(run.policy, rows, plan, run.progress.step, batch_size)

    return _steps(_plain_batches(records, records_per_step), run, gradient, save_every, keep)


def _plain_batches(records: Iterable[Record], size: int) -> Iterator[StepBatch]:
    rows: list[list[Record]] = []
    for number, record in enumerate(records):
        if "error" not in record:
            record.setdefault("id", f"record-{number}")
            rows.append([record])
        if len(rows) == size:
            yield StepBatch(rows, 0, None)
            rows = []
    if rows:
        yield StepBatch(rows, 0, None)


def _steps(
    batches: Iterator[StepBatch], run: Run, gradient: Any, save_every: int, keep: int
) -> Iterator[dict[str, Any]]:
    taken = 0
    try:
        for batch in batches:
            if batch.groups:
                yield _step(batch, run, gradient)
                taken += 1
            if batch.finished_round is not None:
                run.progress.round = batch.finished_round + 1
            if batch.finished_round is not None or run.progress.step - run.saved_step >= save_every:
                run.save(keep)
    finally:
        if run.progress.step != run.saved_step:
            run.save(keep)
    if not taken:
        raise UsageError("no records came in; nothing was trained")


def _step(batch: StepBatch, run: Run, gradient: Any) -> dict[str, Any]:
    begun = time.monotonic()
    with run.precision():
        metrics = gradient(batch)
    stepped = run.step()
    rows = [record for group in batch.groups for record in group]
    tokens = sum(_tokens(record) for record in rows)
    run.progress.completions += len(rows)
    run.progress.tokens += tokens
    record = {
        "algo": run.progress.algo,
        "run": run.directory.name,
        "step": run.progress.step,
        **({} if batch.finished_round is None else {"round": batch.finished_round}),
        "prompts": len(batch.groups),
        "completions": len(rows),
        **metrics,
        **stepped,
        "skipped": run.progress.skipped,
        "seconds": time.monotonic() - begun,
        "tokens_per_second": tokens / (time.monotonic() - begun),
        "peak_memory_mb": _peak_memory(run.policy.device) / 2**20,
    }
    with (run.directory / "metrics.jsonl").open("ab") as log:
        log.write(dump(record))
    return record


def _tokens(record: Record) -> int:
    return len((record.get("tokens") or {}).get("completion") or record.get("completion", ""))


def _peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA what torch allocated at most, elsewhere the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
