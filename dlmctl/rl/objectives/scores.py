"""What an objective sees of a batch: log-probabilities under the policies, and the advantages.

An objective is a function from `Scores` to a loss. The log-probabilities of the current policy are
a leaf: the derivative of the loss by each of them is all that the backward pass through the model
needs (rl/gradient), so that no objective deals with micro-batches, masks or memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from dlmctl.settings.algorithms import Recipe

Needs = Literal["nothing", "relative", "log_probs", "ratios"]
"""nothing: the loss is linear in the log-probabilities of the policy, with weights that come from
the advantages alone; relative: linear, with weights from the ELBO difference to the reference;
log_probs: anything else; ratios: the same, with those of the policy that sampled, too."""


@dataclass(frozen=True)
class Scores:
    """A batch of N completions with K masks of at most G tokens; everything float64, in nats."""

    current: Tensor
    """[N, K, G], log-probability of the target tokens under the policy that is trained; zeros where
    the loss is linear in them."""
    old: Tensor
    """The same under the policy that the completions were sampled from; zeros if the objective
    takes no ratio to it."""
    reference: Tensor
    """The same under the frozen reference; zeros if the objective does not need it."""
    targets: Tensor
    """bool [N, K, G], the tokens that the three are of; elsewhere they are 0."""
    weights: Tensor
    """[N, K], the weight of each mask in the ELBO."""
    lengths: Tensor
    """[N], scored tokens of each completion."""
    advantage: Tensor
    """[N]."""
    prompt: Tensor
    """int64 [N], which group a completion belongs to: 0, 1, …"""
    relative: Tensor | None = None
    """[N, K], ELBO difference of current and reference, if the weights come from it."""
    token_weights: Tensor = field(default_factory=lambda: torch.ones(1, 1, dtype=torch.float64))
    """[N, G], w > 0 of each token of a completion; 1 if the algorithm has none."""

    def elbo(self, log_probs: Tensor) -> Tensor:
        """The ELBO [N] of log-probabilities [N, K, G]."""
        return (self.weights * log_probs.sum(dim=2)).mean(dim=1)

    def relative_samples(self) -> Tensor:
        """ELBO difference of current and reference for each mask: [N, K], without gradient."""
        if self.relative is not None:
            return self.relative
        return (self.weights * (self.current - self.reference).sum(dim=2)).detach()


class Objective(Protocol):
    """What is descended."""

    recipe: ClassVar[Recipe]

    @property
    def needs(self) -> Needs:
        """What the gradient depends on, which is scored before it is taken."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss depends on the reference."""

    def loss(self, scores: Scores) -> Tensor:
        """The loss, a scalar with gradient by `scores.current`."""

    def metrics(self, scores: Scores) -> dict[str, Any]:
        """What else is worth a look."""


class PenalizedRatios:
    """An objective of ratios to the old policy, with a KL penalty to the reference."""

    beta: float
    """Coefficient of the penalty."""

    @property
    def needs(self) -> Needs:
        return "ratios"

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic surrogate, to be ascended; `ratio` and `advantage` broadcast."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def clipped_share(ratio: Tensor, advantage: Tensor, clip: float) -> float:
    """Share of the ratios whose gradient the clip takes away."""
    high = (ratio > 1 + clip) & (advantage > 0)
    low = (ratio < 1 - clip) & (advantage < 0)
    return float((high | low).double().mean()) if ratio.numel() else 0.0
