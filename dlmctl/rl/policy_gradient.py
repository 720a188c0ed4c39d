"""Steps on a batch of verified groups: from records to gradients.

What the records lack is computed: advantages from rewards, scores of the current and the reference
policy under one draw of masks. What they have is used, so that `rollout | verify | update` and
`rollout | verify | score-elbo | advantage | update` take the same step.

N completions, K masks for each, G tokens in the longest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example, log_probs, mask_weights
from dlmctl.diffusion.scoring import MaskPlan, even_masks, example_of
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.records.jsonl import field as record_field
from dlmctl.rl.advantage_stage import from_rewards
from dlmctl.rl.advantages import Normalization
from dlmctl.rl.batches import sampled_from
from dlmctl.rl.decoding import check_left_to_right
from dlmctl.rl.gradient import accumulate_gradient, compared_gradient
from dlmctl.rl.objectives.scores import Objective, Scores
from dlmctl.rl.recorded import recorded_difference
from dlmctl.rl.srpo.per_token import sampled_log_probs, token_weights

Scorer = Callable[[Sequence[Example]], Tensor]
"""Log-probabilities [N, K, G] of the target tokens under some weights, in nats."""


class Reference(NamedTuple):
    """The frozen policy in the log-ratio."""

    revision: str
    """Hash of its weights."""
    log_probs: Scorer


def no_other_weights(record: Record) -> Scorer:
    """The sampler of a batch that was sampled from the current policy: there is no other."""
    raise DataError("sampled from other weights than the current ones", record.where)


@dataclass(frozen=True)
class Batching:
    """How records become the batch that an objective sees."""

    plan: MaskPlan
    normalization: Normalization = field(default_factory=Normalization)
    inner: int = 1
    """Steps on a batch, each with masks of its own."""
    drop_zero_advantage: bool = False
    independent_residual: bool = False
    """The log-ratio to the reference is measured under a second draw of masks."""


class Passes(NamedTuple):
    """How often a completion goes through the models under each of its masks, in all steps."""

    policy: int
    """Without gradient."""
    reference: int
    """Without gradient, under the frozen reference."""
    gradient: int
    """Forward and backward."""


def passes_for(objective: Objective, inner: int, sampled: bool) -> Passes:
    """The passes that `policy_gradients` takes on a batch that was sampled from the policy, after
    the first step has moved it away from the reference.

    Args:
        inner: steps on a batch.
        sampled: the scores of the old policy are those that `rollout` recorded.
    """
    if objective.needs == "nothing":
        return Passes(0, 0, inner)
    # In the first step the old policy is the current one, which is scored once.
    again = inner - 1 if objective.needs == "ratios" and not sampled else 0
    return Passes(inner + again, inner if objective.needs_reference else 0, inner)


def policy_gradients(
    policy: Policy,
    reference: Reference,
    groups: Sequence[Sequence[Record]],
    objective: Objective,
    batching: Batching,
    batch_size: int,
    sampler: Callable[[Record], Scorer] = no_other_weights,
    compare: bool = False,
) -> Iterator[dict[str, Any]]:
    """Accumulate the gradient of each inner step in turn; the caller applies it before the next.

    Args:
        sampler: gives the weights that a record was sampled from, if these are not the policy's.
        compare: the first step says how its gradient compares with the one that it would have
            without token weights.

    Yields:
        Metrics of the batch: loss, advantage, KL estimate, mask variance, and the objective's own.

    Raises:
        DataError: a record lacks its completion, or both reward and advantage, or the token
            weights that the objective needs; or it was sampled in another order than the
            objective scores it in; or a ratio is to weights that cannot be found.
    """
    advantage = batch_advantages(groups, batching)
    kept = advantage != 0 if batching.drop_zero_advantage else torch.ones_like(advantage).bool()
    if not kept.any():
        yield {"loss": 0.0, "advantage_std": 0.0, "dropped": len(kept)}
        return
    prompt = torch.tensor([g for g, group in enumerate(groups) for _ in group])[kept]
    rows = [record for group in groups for record in group]
    records = [record for record, keep in zip(rows, kept.tolist(), strict=True) if keep]
    if objective.recipe.left_to_right and policy.diffusion:
        check_left_to_right(records, policy)
    batch = _Batch(policy, reference, records, advantage[kept], prompt, batching, batch_size)
    draws = [batch.examples(2 * step) for step in range(batching.inner)]
    old = batch.old(draws, objective, sampler) if objective.needs == "ratios" else None
    for step, examples in enumerate(draws):
        scores = batch.scores(examples, objective, old, step)
        loss = objective.loss(scores)
        (coefficients,) = torch.autograd.grad(loss, scores.current)
        cosine = {}
        if compare and step == 0:
            plain = dataclasses.replace(scores, token_weights=torch.ones_like(scores.token_weights))
            (others,) = torch.autograd.grad(objective.loss(plain), plain.current)
            value, cosine["gradient_cosine"] = compared_gradient(
                policy, examples, coefficients, others, batch_size
            )
        else:
            value = accumulate_gradient(policy, examples, coefficients, batch_size)
        yield {
            "loss": float(loss.detach()) if objective.needs in SCORED else value,
            "advantage_std": float(batch.advantage.std()) if len(records) > 1 else 0.0,
            **({} if kept.all() else {"dropped": len(kept) - len(records)}),
            **(_distance(scores) if objective.needs_reference else {}),
            **objective.metrics(scores),
            **cosine,
        }


SCORED = ("log_probs", "ratios")
"""Needs that take the log-probabilities of the policy before its gradient."""


class OldScores(NamedTuple):
    """Log-probabilities under the policy that sampled a batch."""

    log_probs: list[Tensor]
    """[N, K, G] for each step."""
    is_current: bool
    """Whether that is the policy before the first step."""


@dataclass(frozen=True)
class _Batch:
    """The completions of a batch, and how they are scored."""

    policy: Policy
    reference: Reference
    records: list[Record]
    advantage: Tensor
    prompt: Tensor
    batching: Batching
    batch_size: int

    def examples(self, draw: int) -> list[Example]:
        """The batch under one draw of masks."""
        plan = dataclasses.replace(self.batching.plan, draw=draw)
        return even_masks([example_of(record, self.policy, plan) for record in self.records])

    def log_probs(self, examples: Sequence[Example]) -> Tensor:
        """[N, K, G] under the current policy."""
        return log_probs(self.policy, examples, self.batch_size)

    def old(
        self,
        draws: Sequence[Sequence[Example]],
        objective: Objective,
        sampler: Callable[[Record], Scorer],
    ) -> OldScores:
        """Under the policy that each completion was sampled from.

        A completion that does not name its policy counts as sampled from the current one.
        """
        if objective.recipe.sampled_old and not self.policy.diffusion:
            recorded = sampled_log_probs(self.records, draws[0])
            if recorded is not None:
                return OldScores([recorded] * len(draws), False)
        now = self.policy.revision
        rows: dict[str, list[int]] = {}
        for n, record in enumerate(self.records):
            rows.setdefault(sampled_from(record) or now, []).append(n)
        tables = [_zeros(examples) for examples in draws]
        for revision, own in rows.items():
            score = self.log_probs if revision == now else sampler(self.records[own[0]])
            for table, examples in zip(tables, draws, strict=True):
                values = score([examples[n] for n in own])
                table[own, :, : values.shape[2]] = values
        return OldScores(tables, [*rows] == [now])

    def scores(
        self, examples: list[Example], objective: Objective, old: OldScores | None, step: int
    ) -> Scores:
        """What the objective needs; the rest is zeros."""
        current = reference = zeros = _zeros(examples)
        if objective.needs in SCORED:
            if old is not None and old.is_current and step == 0:
                current = old.log_probs[0]
            else:
                current = self.log_probs(examples)
            if objective.needs_reference:
                same = self.at_reference(step)
                reference = current if same else self.reference.log_probs(examples)
        return Scores(
            current.clone().requires_grad_(),
            zeros if old is None else old.log_probs[step],
            reference,
            _targets(examples),
            mask_weights(examples),
            _lengths(examples),
            self.advantage,
            self.prompt,
            self.relative(examples, step) if objective.needs == "relative" else None,
            self.token_weights(examples, objective),
        )

    def at_reference(self, step: int) -> bool:
        """Whether policy and reference have the same weights, so that one pass scores both."""
        return step == 0 and self.policy.revision == self.reference.revision

    def token_weights(self, examples: Sequence[Example], objective: Objective) -> Tensor:
        """[N, G]; 1 if the algorithm has none."""
        if objective.recipe.token_weights:
            return token_weights(self.records, examples)
        width = max(len(example.completion) for example in examples)
        return torch.ones(len(examples), width, dtype=torch.float64)

    def relative(self, examples: list[Example], step: int) -> Tensor:
        """d of every record, one value for each mask: float64 [N, K], in nats.

        In the first step it is taken from the records, if they have it.
        """
        draw = 2 * step + self.batching.independent_residual
        if step == 0:
            plan = dataclasses.replace(self.batching.plan, draw=draw)
            recorded = recorded_difference(self.records, self.policy, self.reference.revision, plan)
            if recorded is not None:
                return recorded
        if self.at_reference(step):
            return torch.zeros_like(mask_weights(examples))
        if self.batching.independent_residual:
            examples = self.examples(draw)
        log_ratio = self.log_probs(examples) - self.reference.log_probs(examples)  # [N, K, G]
        return log_ratio.sum(dim=2) * mask_weights(examples)


def batch_advantages(groups: Sequence[Sequence[Record]], batching: Batching) -> Tensor:
    """A_i of every record, float64 [N]: the record's own, else from the rewards."""
    if all("advantage" in record for group in groups for record in group):
        values = [
            float(record_field(r, "advantage", (int, float))) for group in groups for r in group
        ]
        return torch.tensor(values, dtype=torch.float64)
    computed = from_rewards(groups, batching.normalization)
    return torch.tensor([a for group in computed for a in group], dtype=torch.float64)


def _zeros(examples: Sequence[Example]) -> Tensor:
    """Zeros [N, K, G]."""
    width = max(len(example.completion) for example in examples)
    return torch.zeros(*mask_weights(examples).shape, width, dtype=torch.float64)


def _targets(examples: Sequence[Example]) -> Tensor:
    targets = _zeros(examples).bool()
    for n, example in enumerate(examples):
        targets[n, :, : len(example.completion)] = example.masks.targets
    return targets


def _lengths(examples: Sequence[Example]) -> Tensor:
    lengths = [max(1, int(example.masks.scored.sum())) for example in examples]
    return torch.tensor(lengths, dtype=torch.float64)


def _distance(scores: Scores) -> dict[str, Any]:
    """How far the policy is from the reference."""
    relative = scores.relative_samples()
    variance = float(relative.var(dim=1).mean()) if relative.shape[1] > 1 else None
    return {"mask_variance": variance, "kl": float(relative.mean())}
