"""One step of RSPO or REINFORCE on a batch of verified groups: from records to a gradient.

What the records lack is computed: advantages from rewards, scores of the current and the reference
policy under one draw of masks. What they bear is taken, so that `rollout | verify | update` and
`rollout | verify | score-elbo | advantage | update` make the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example, elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, example_of, relative_score
from dlmctl.models.policy import Policy
from dlmctl.records.jsonl import Record
from dlmctl.records.jsonl import field as record_field
from dlmctl.rl.advantages import Baseline, Scale, advantages
from dlmctl.rl.gradient import accumulate_gradient
from dlmctl.rl.rspo import Centre, Residual, ScoreNorm, residual_weights


class Reference(NamedTuple):
    """The frozen policy that the log-ratio is taken to."""

    revision: str
    """Hash of its weights."""
    scores: Callable[[Sequence[Example]], list[Tensor]]
    """One tensor [K] in nats for each example."""


@dataclass(frozen=True)
class Objective:
    """What is descended."""

    algo: Literal["rspo", "reinforce"] = "rspo"
    strength: float = 0.01
    """lambda of RSPO, per nat."""
    score_norm: ScoreNorm = "sequence"
    centre: Centre = "batch"
    baseline: Baseline = "mean"
    scale: Scale = "none"
    plan: MaskPlan = field(default_factory=MaskPlan)

    @property
    def feedback(self) -> float:
        """lambda as it acts: REINFORCE is lambda 0."""
        return self.strength if self.algo == "rspo" else 0.0


def policy_gradient(
    policy: Policy,
    reference: Reference,
    groups: Sequence[Sequence[Record]],
    objective: Objective,
    batch_size: int,
) -> dict[str, Any]:
    """Accumulate the gradient of a batch of groups into the policy's parameters.

    Returns:
        Metrics of the batch: loss, advantage and feedback, mask variance, KL estimate.

    Raises:
        DataError: a record lacks its completion, or both reward and advantage.
    """
    records = [record for group in groups for record in group]
    examples = [example_of(record, policy, objective.plan) for record in records]
    advantage = batch_advantages(groups, objective)
    lengths = torch.tensor([_scored_length(example) for example in examples], dtype=torch.float64)
    per_score = 1 / lengths if objective.score_norm == "token" else torch.ones_like(lengths)

    if objective.feedback == 0:
        weights, feedback = advantage, {}
    else:
        relative = relative_scores(policy, reference, records, examples, objective, batch_size)
        means = torch.stack([samples.mean() for samples in relative])
        keys = [r["id"] for r in records] if objective.centre == "prompt" else None
        residual = residual_weights(advantage, means * per_score, objective.feedback, keys)
        weights, feedback = residual.weights, _feedback_metrics(residual, advantage, relative)
    coefficients = -weights * per_score / len(records)
    loss = accumulate_gradient(policy, examples, coefficients, batch_size)
    return {"loss": loss, "advantage_std": _std(advantage), **feedback}


def batch_advantages(groups: Sequence[Sequence[Record]], objective: Objective) -> Tensor:
    """A_i of every record, float64 [N]: as the records bear it, else from their rewards."""
    if all("advantage" in record for group in groups for record in group):
        values = [
            float(record_field(r, "advantage", (int, float))) for group in groups for r in group
        ]
        return torch.tensor(values, dtype=torch.float64)
    hint = "'dlmctl verify' writes it"
    rewards = [
        [float(record_field(r, "reward", (int, float), hint)) for r in group] for group in groups
    ]
    made = advantages(rewards, objective.baseline, objective.scale)
    return torch.tensor([a for group in made for a in group], dtype=torch.float64)


def relative_scores(
    policy: Policy,
    reference: Reference,
    records: Sequence[Record],
    examples: Sequence[Example],
    objective: Objective,
    batch_size: int,
) -> list[Tensor]:
    """d_i of every record, one value for each mask: float64 [K] each, in nats.

    Scores labelled `policy` and `reference` in the records are taken where they were made by this
    reference and by the policy as it is now.
    """
    revisions = {"policy": policy.revision, "reference": reference.revision}
    if all(_scored_by(record, revisions) for record in records):
        return [relative_score(record, "policy", "reference") for record in records]
    current = elbo_samples(policy, examples, batch_size)
    frozen = reference.scores(examples)
    return [now - then for now, then in zip(current, frozen, strict=True)]


def _scored_by(record: Record, revisions: Mapping[str, str]) -> bool:
    scores = record.get("elbo") or {}
    return all(scores.get(label, {}).get("revision") == made for label, made in revisions.items())


def _scored_length(example: Example) -> int:
    return max(1, int(example.masks.scored.sum()))


def _feedback_metrics(
    residual: Residual, advantage: Tensor, relative: Sequence[Tensor]
) -> dict[str, Any]:
    nonzero = advantage != 0
    ratio = (residual.feedback[nonzero] / advantage[nonzero]).abs()
    flipped = residual.weights[nonzero] * advantage[nonzero] < 0
    variances = [float(samples.var()) for samples in relative if len(samples) > 1]
    return {
        "feedback_ratio": float(ratio.median()) if len(ratio) else None,
        "flipped": float(flipped.double().mean()) if len(flipped) else None,
        "mask_variance": sum(variances) / len(variances) if variances else None,
        "kl": sum(float(samples.mean()) for samples in relative) / len(relative),
    }


def _std(values: Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
