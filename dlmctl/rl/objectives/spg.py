"""SPG: a lower bound for what is good, an upper bound for what is bad (arXiv 2510.09541).

With m_k target tokens masked by mask k of K, and t_k = m_k / L_i:

    elbo_i = mean_k (1/m_k) sum_t log p_kt                         where A_i > 0
    eubo_i = (1/beta) mean_t log mean_k (p_kt^beta / t_k)          over tokens masked at least once
    omega eubo_i + (1 - omega) elbo_i                              where A_i <= 0
    L      = -sum_i A_i score_i L_i / sum_i L_i

A mask that leaves a token counts as 0 in mean_k. omega = 1 is the pure upper bound. Neither an old
policy nor a reference enters. Published: omega 0.5, beta 1 to 2 by task (1.5 here), two block-wise
masks, 0.15 of the prompt and of the blocks before masked as well (these are scored), 4 inner steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlmctl.rl.objectives.scores import Needs, Scores
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Spg:
    """The objective `spg`."""

    beta: float
    omega: float

    recipe: ClassVar[Recipe] = RECIPES["spg"]

    @property
    def needs(self) -> Needs:
        return "log_probs"

    @property
    def needs_reference(self) -> bool:
        return False

    def loss(self, scores: Scores) -> Tensor:
        lower = lower_bound(scores)
        mixed = self.omega * upper_bound(scores, self.beta) + (1 - self.omega) * lower
        value = torch.where(scores.advantage > 0, lower, mixed)
        return -(scores.advantage * value * scores.lengths).sum() / scores.lengths.sum()

    def metrics(self, scores: Scores) -> dict[str, Any]:
        gap = upper_bound(scores, self.beta) - lower_bound(scores)
        return {"bound_gap": float(gap.detach().mean())}


def lower_bound(scores: Scores) -> Tensor:
    """ELBO per token [N] of log-probabilities of the current policy."""
    counts = scores.targets.sum(dim=2).clamp(min=1)
    return (scores.current.sum(dim=2) / counts).mean(dim=1)


def upper_bound(scores: Scores, beta: float) -> Tensor:
    """EUBO per token [N]; in logarithms, so that no probability underflows."""
    masks = scores.targets.shape[1]
    level = scores.targets.sum(dim=2) / scores.lengths[:, None]
    terms = beta * scores.current - level.clamp(min=1e-8).log()[:, :, None]
    masked_once = scores.targets.any(dim=1)
    # Finite, so that tokens which no mask has have gradient 0 instead of none.
    terms = terms.masked_fill(~scores.targets, -1e9)
    means = (terms.logsumexp(dim=1) - math.log(masks)) * masked_once
    return means.sum(dim=1) / masked_once.sum(dim=1).clamp(min=1) / beta
