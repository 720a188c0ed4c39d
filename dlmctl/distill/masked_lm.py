"""Masked consistency: a student that decides many tokens in the pass its teacher decides few in.

With nested masks M_s in M_t (distill/nested_masks) of a completion y, z_t and z_s what they leave
of it, and k tokens hidden at t:

    L = E (1/k) [ sum_{i in M_s} D(p_target(. | z_s), p_student(. | z_t))
                  - sum_{i in M_t, not in M_s} log p_student(y_i | z_t) ]

The student, which sees z_t alone, is to predict what the target predicts once the tokens between
the two levels are decided. Where nothing is hidden at s this is masked cross-entropy, the boundary
condition; if all were, L would be the negative ELBO per token. The target is the teacher in the
first round, and afterwards the student as it was when the round began, with twice the tokens to a
step: after r rounds from m tokens on a pass stands for 2^r m. (The form follows MCD, arXiv
2602.00792, and the doubling SDTT, arXiv 2410.21035; the weight 1/k and the levels are ours.)

Completions from a data set anchor the student in the data; completions that the teacher sampled let
it learn from nothing but the teacher. For the study of memorization these are two different arms.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import own_parts, scored_states, scored_tokens
from dlmctl.diffusion.projection import weighted_log_prob
from dlmctl.distill.fused_linear_kl import Divergence, weighted_divergence
from dlmctl.distill.nested_masks import Nested, Order, draw_nested
from dlmctl.models.adapters import merged
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import publish_directory
from dlmctl.records.jsonl import Record, each
from dlmctl.rl.batches import StepBatch
from dlmctl.rl.supervised import with_completion_ids
from dlmctl.rl.update import plain_batches, take_steps
from dlmctl.train.distributed import agreed, is_first, total
from dlmctl.train.run import Run
from dlmctl.train.sharding import whole_pass

ALGO = "masked-consistency"
"""The name of such a run."""


@dataclass(frozen=True)
class MaskedConsistency:
    """How levels are drawn, and what is compared at them."""

    order: Order = "random"
    divergence: Divergence = "kl-fwd"
    decided: int = 1
    """m of the first round, tokens between the two levels."""
    rounds: int = 3
    steps_per_round: int = 500
    until_eos: bool = False
    seed: int = 0


class Pair(NamedTuple):
    """A completion at two levels."""

    prompt: Sequence[int]
    completion: Sequence[int]
    levels: Nested


def consistency_gradient(
    student: Policy,
    target: Policy,
    pairs: Sequence[Pair],
    divergence: Divergence,
    batch_size: int,
) -> dict[str, float]:
    """Accumulate the gradient of L, the mean over the pairs; each rank that of its share.

    Args:
        target: whole on every rank, as its passes are not the same in number.

    Returns:
        loss, and its two parts consistency and cross_entropy, in nats per token.
    """
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt) + len(pair.completion))
    found = torch.zeros(2, dtype=torch.float64)
    student.model.train()
    for part, counts in own_parts(ordered, batch_size):
        share = counts / len(pairs)
        losses = functools.partial(_losses, student, target, part, divergence, share)
        apart, missed = whole_pass(student.model, losses)
        (apart + missed).backward()
        found += torch.stack([apart.detach(), missed.detach()]).double().cpu()
    student.model.eval()
    consistency, cross_entropy = total(found).tolist()
    return {
        "loss": consistency + cross_entropy,
        "consistency": consistency,
        "cross_entropy": cross_entropy,
    }


def _losses(
    student: Policy, target: Policy, pairs: Sequence[Pair], divergence: Divergence, share: float
) -> tuple[Tensor, Tensor]:
    """The two parts of L of a micro-batch, each completion with this share in the mean."""
    given = [pair.prompt for pair in pairs], [pair.completion for pair in pairs]
    hidden = scored_states(student, *given, [pair.levels.hidden for pair in pairs])
    counts = torch.tensor([int(pair.levels.hidden.sum()) for pair in pairs], dtype=torch.float64)
    weights = (share / counts).to(hidden.rows.device)[hidden.rows]
    width = max(len(pair.completion) for pair in pairs)
    still = torch.zeros(len(pairs), width, dtype=torch.bool)
    for n, pair in enumerate(pairs):
        still[n, : len(pair.completion)] = pair.levels.still
    later = still.to(hidden.rows.device)[hidden.rows, hidden.columns]
    missed = weighted_log_prob(
        student, hidden.states[~later], hidden.targets[~later], -weights[~later]
    )
    if not bool(later.any()):
        return torch.zeros_like(missed), missed
    with torch.no_grad():
        goals = scored_states(target, *given, [pair.levels.still for pair in pairs])
    # Both list their tokens row by row, so that these are the same ones in the same order.
    apart = weighted_divergence(
        student, hidden.states[later], target, goals.states, weights[later], divergence
    )
    return apart, missed


def distill_masked(
    records: Iterable[Record],
    run: Run,
    plan: MaskedConsistency,
    records_per_step: int,
    batch_size: int,
    fill_to: int | None,
    keep: int,
) -> Generator[dict[str, Any], None, None]:
    """The metrics of each step; the run ends after all rounds, or with the records.

    Raises:
        UsageError: the model does not denoise, or the run is at its end already.
    """
    if not run.policy.diffusion:
        raise UsageError(f"{run.policy.name} is autoregressive: there are no masks to distil")
    left = plan.rounds * plan.steps_per_round - run.progress.step
    if left <= 0:
        raise UsageError(
            f"{run.directory} has taken its {run.progress.step} steps: more --rounds go on"
        )
    targets = _Targets(run, plan.steps_per_round, keep)

    def gradients(batch: StepBatch) -> Iterator[dict[str, Any]]:
        number = run.progress.step // plan.steps_per_round
        decided = plan.decided * 2**number
        pairs = [
            _pair(record, run.policy, plan, decided, run.progress.step) for record in batch.rows
        ]
        target = targets.of(number)
        metrics = consistency_gradient(run.policy, target, pairs, plan.divergence, batch_size)
        yield {"round": number, "decided": decided, **metrics}

    prepared = each(records, lambda record: with_completion_ids(record, run.policy, fill_to))
    batches = islice(plain_batches(prepared, records_per_step, run.passed), left)
    return take_steps(batches, run, gradients, plan.steps_per_round, keep)


def _pair(record: Record, policy: Policy, plan: MaskedConsistency, decided: int, step: int) -> Pair:
    tokens = record["tokens"]
    keys = (plan.seed, step, record["id"], record.get("sample", 0), "levels")
    scored = scored_tokens(tokens["completion"], policy, plan.until_eos)
    levels = draw_nested(record, scored, plan.order, decided, keys)
    return Pair(tokens["prompt"], tokens["completion"], levels)


class _Targets:
    """The frozen model of each round: the teacher, then the student as it was at its begin.

    The latter stands in RUN/target-NN, so that a run that goes on within a round has it.
    """

    def __init__(self, run: Run, steps_per_round: int, keep: int) -> None:
        self._run, self._steps, self._keep = run, steps_per_round, keep
        self._held: tuple[int, Policy] | None = None

    def of(self, number: int) -> Policy:
        """Raises DataError where the model of a round that is under way is not there."""
        if self._held is None or self._held[0] != number:
            self._held = None  # before the next one is loaded
            self._held = number, self._load(number)
        return self._held[1]

    def _load(self, number: int) -> Policy:
        run = self._run
        device = str(run.policy.device)
        if number == 0:
            return merged(load_policy(run.progress.reference, device, "float32"))
        place = self._place(number)
        if run.progress.step == number * self._steps:
            # First the checkpoint: a run that dies in between comes back to this very step.
            if run.saved_step != run.progress.step:
                run.save(self._keep)
            whole = run.whole_policy()
            if is_first():
                publish_directory(place, lambda directory: save_policy(whole, directory))
                shutil.rmtree(self._place(number - 1), ignore_errors=True)
            agreed(number)  # from here on it is there
        if not place.exists():
            raise DataError(
                f"{place} is missing, the target of this round: begin a new run, or give the "
                "--steps-per-round that this one has"
            )
        return load_policy(str(place), device, "float32")

    def _place(self, number: int) -> Path:
        return self._run.directory.path / f"target-{number:02d}"
