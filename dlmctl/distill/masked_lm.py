"""Masked consistency: the student decides in one pass what its teacher decides in several.

With nested masks M_s in M_t (distill/nested_masks) of a completion y, z_t and z_s the completion
under them, and k tokens masked at t:

    L = E (1/k) [ sum_{i in M_s} D(p_target(. | z_s), p_student(. | z_t))
                  - sum_{i in M_t, not in M_s} log p_student(y_i | z_t) ]

The student, which sees only z_t, learns to predict what the target predicts once the tokens between
the two levels are decided. If M_s is empty this is masked cross-entropy, the boundary condition; if
it always were, L would be the negative ELBO per token. The target is the teacher in the first
round, and in each later one the student as it was when the round began, with twice as many tokens
per step: after r rounds that began with m tokens, one pass stands for 2^r m. (The form follows MCD,
arXiv 2602.00792, and the doubling SDTT, arXiv 2410.21035; the weight 1/k and the levels are ours.)

Completions of a data set anchor the student in the data; from completions that the teacher sampled
it learns from the teacher alone. A study of memorization treats these as two different arms.

A student with several mask tokens has a likelihood of what a step decides in the place of all this:
see distill/mixture.

Certainty forcing (dParallel, arXiv 2509.26488) adds beta (1/k) sum H(p_student(. | z_t)) over the
i in M_t that the student predicts as y_i: they pass a threshold of confidence sooner, so that a
pass decides more of them. (The mean over all k masked tokens is ours; there it is over those that
are right.)
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import own_parts, scored_states, scored_tokens
from dlmctl.diffusion.fused_linear_logprob import weighted_log_prob
from dlmctl.distill.fused_linear_losses import weighted_divergence, weighted_entropy
from dlmctl.distill.mixture import mixture_gradient
from dlmctl.distill.nested_masks import NestedExample, draw_nested
from dlmctl.models.adapters import merged
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy
from dlmctl.models.sending import sent
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import publish_directory
from dlmctl.records.jsonl import Record, each
from dlmctl.rl.batches import StepBatch
from dlmctl.rl.supervised import with_completion_ids
from dlmctl.rl.update import plain_batches, take_steps
from dlmctl.settings.distill import Divergence, MaskedConsistency
from dlmctl.settings.masks import Fill
from dlmctl.train.distributed import all_reduce_sum, broadcast, is_first
from dlmctl.train.run import Run
from dlmctl.train.sharding import whole_pass

CERTAINTY_TEMPERATURE = 0.5
"""Of the predictions whose entropy certainty forcing lowers, as in dParallel's code."""
ALGO = "masked-consistency"
"""What the progress of such a run calls its algorithm."""


def consistency_gradient(
    student: Policy,
    target: Policy,
    examples: Sequence[NestedExample],
    divergence: Divergence,
    batch_size: int,
    certainty: float = 0.0,
) -> dict[str, float]:
    """Accumulate the gradient of L, the mean over the examples; each rank that of its share.

    Args:
        target: unsharded on every rank, as ranks differ in their number of passes through it.
        certainty: beta.

    Returns:
        loss, and its parts consistency and cross_entropy, and entropy if beta is not 0, in nats per
        token.
    """
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.completion))
    names = ["consistency", "cross_entropy", *(["entropy"] if certainty else [])]
    sums = torch.zeros(len(names), dtype=torch.float64, device=student.device)
    student.model.train()
    for part, counts in own_parts(ordered, batch_size):
        share = counts / len(examples)
        losses = functools.partial(_losses, student, target, part, divergence, share, certainty)
        parts = torch.stack(whole_pass(student.model, losses))
        parts.sum().backward()
        sums += parts.detach()
    student.model.eval()
    means = all_reduce_sum(sums.cpu()).tolist()
    return {"loss": sum(means), **dict(zip(names, means, strict=True))}


def _losses(
    student: Policy,
    target: Policy,
    examples: Sequence[NestedExample],
    divergence: Divergence,
    share: float,
    certainty: float,
) -> list[Tensor]:
    """The parts of L of a micro-batch, each completion with this share in the mean."""
    texts = [e.prompt for e in examples], [e.completion for e in examples]
    at_t = [e.masks.at_t for e in examples]
    scored = scored_states(student, *texts, at_t)  # K masked tokens, row by row
    counts = torch.tensor([int(mask.sum()) for mask in at_t], dtype=torch.float64)
    weights = sent(share / counts, student.device)[scored.rows]  # [K]
    # Which of them are also in M_s is known on the host.
    also = torch.cat([e.masks.at_s[e.masks.at_t] for e in examples])  # [K]
    later, sooner = (sent(part.nonzero()[:, 0], student.device) for part in (also, ~also))
    cross_entropy = weighted_log_prob(
        student, scored.states[sooner], scored.targets[sooner], -weights[sooner]
    )
    consistency = torch.zeros_like(cross_entropy)
    if also.any():
        with torch.no_grad():
            goals = scored_states(target, *texts, [e.masks.at_s for e in examples])
        # Both list their tokens row by row, so that these are the same tokens in the same order.
        consistency = weighted_divergence(
            student, scored.states[later], target, goals.states, weights[later], divergence
        )
    if not certainty:
        return [consistency, cross_entropy]
    entropy = weighted_entropy(
        student, scored.states, scored.targets, certainty * weights, CERTAINTY_TEMPERATURE
    )
    return [consistency, cross_entropy, entropy]


def distill_masked(
    records: Iterable[Record],
    run: Run,
    plan: MaskedConsistency,
    records_per_step: int,
    batch_size: int,
    fill: Fill | None,
    keep: int,
) -> Generator[dict[str, Any], None, None]:
    """The metrics of each step; the run ends after the last round, or with the records.

    Raises:
        UsageError: the model does not denoise, or the run has taken all its steps already.
    """
    if not run.policy.diffusion:
        raise UsageError(f"{run.policy.name} is autoregressive: there are no masks to distil")
    if run.policy.latent_masks and plan.certainty:
        raise UsageError(
            f"--certainty is for a model with one mask token, and {run.policy.name} has "
            f"{len(run.policy.latent_masks)}: leave it out"
        )
    left = plan.rounds * plan.steps_per_round - run.progress.step
    if left <= 0:
        raise UsageError(
            f"{run.directory} has taken its {run.progress.step} steps: give more --rounds to "
            "continue"
        )
    targets = _Targets(run, plan.steps_per_round, keep)

    def gradients(batch: StepBatch) -> Iterator[dict[str, Any]]:
        number = run.progress.step // plan.steps_per_round
        decided = plan.decided * 2**number
        examples = [
            _example(record, run.policy, plan, decided, run.progress.step) for record in batch.rows
        ]
        if run.policy.latent_masks:
            metrics = mixture_gradient(run.policy, examples, batch_size)
        else:
            metrics = consistency_gradient(
                run.policy,
                targets.of(number),
                examples,
                plan.divergence,
                batch_size,
                plan.certainty,
            )
        yield {"round": number, "decided": decided, **metrics}

    prepared = each(records, lambda record: with_completion_ids(record, run.policy, fill))
    batches = islice(plain_batches(prepared, records_per_step, run.passed), left)
    return take_steps(batches, run, gradients, plan.steps_per_round, keep)


def _example(
    record: Record, policy: Policy, plan: MaskedConsistency, decided: int, step: int
) -> NestedExample:
    tokens = record["tokens"]
    keys = (plan.seed, step, record["id"], record.get("sample", 0), "levels")
    scored = scored_tokens(tokens["completion"], policy, plan.until_eos)
    masks = draw_nested(record, scored, plan.order, decided, keys)
    return NestedExample(tokens["prompt"], tokens["completion"], masks)


class _Targets:
    """The frozen target of each round: the teacher, then the student as it was at the beginning.

    The latter is saved in RUN/target-NN for a run that is resumed within a round.
    """

    def __init__(self, run: Run, steps_per_round: int, keep: int) -> None:
        self._run, self._steps, self._keep = run, steps_per_round, keep
        self._held: tuple[int, Policy] | None = None

    def of(self, number: int) -> Policy:
        """The target of a round; raises DataError if the round has begun and has lost it."""
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
            # First the checkpoint: a run that dies in between resumes at this very step.
            if run.saved_step != run.progress.step:
                run.save(self._keep)
            whole = run.whole_policy()
            if is_first():
                publish_directory(place, lambda directory: save_policy(whole, directory))
                shutil.rmtree(self._place(number - 1), ignore_errors=True)
            broadcast(number)  # from here on it exists
        if not place.exists():
            raise DataError(
                f"{place} is missing, the target of this round: begin a new run, or give the "
                "--steps-per-round that this one has"
            )
        return load_policy(str(place), device, "float32")

    def _place(self, number: int) -> Path:
        return self._run.directory.path / f"target-{number:02d}"
