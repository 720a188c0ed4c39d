"""BGPO: a lower bound of PPO's objective that is a sum over the masks (arXiv 2510.11683).

With d_ik the difference of current and old ELBO by mask k alone, per token, a ratio of the whole
completion would be rho_i = exp(mean_k d_ik). Each mask has one of its own instead,

    rho_ik = 1 + d_ik      where A_i >= 0, since exp(x) >= 1 + x
    rho_ik = exp(d_ik)     where A_i < 0, since the mean of exp is at least exp of the mean

so that mean_k rho_ik A_i <= rho_i A_i, with equal value and gradient where current and old policy
are the same. With PPO's clip, a dual clip C and L_i scored tokens:

    l_ik = -min(rho_ik A_i, clip(rho_ik, 1 - eps, 1 + eps) A_i), at most -C A_i where A_i < 0
    L    = sum_i L_i (1/K) sum_k l_ik / sum_i L_i

Such a sum needs the graph of one mask at a time. Here every objective does (rl/gradient), and the
bound is what is left of it: a ratio for each mask, whose noise is clipped rather than averaged.

Published: 16 masks with levels of their own, advantages divided by the group's deviation, eps 0.2,
C 3, one step on a batch, lr 5e-7. The authors' repository could not be read. The loss is that of
yjyddq/DARE, which is built on it, and has both properties that the abstract states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlmctl.rl.objectives.scores import Needs, Scores, clipped_share, clipped_surrogate
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Bgpo:
    """The objective `bgpo`."""

    clip: float
    dual_clip: float | None

    recipe: ClassVar[Recipe] = RECIPES["bgpo"]

    @property
    def needs(self) -> Needs:
        return "ratios"

    @property
    def needs_reference(self) -> bool:
        return False

    def loss(self, scores: Scores) -> Tensor:
        advantage = scores.advantage[:, None]
        loss = -clipped_surrogate(_ratio(scores), advantage, self.clip)  # [N, K]
        if self.dual_clip is not None:
            bound = torch.minimum(loss, -self.dual_clip * advantage)
            loss = torch.where(advantage < 0, bound, loss)
        return (loss.mean(dim=1) * scores.lengths).sum() / scores.lengths.sum()

    def metrics(self, scores: Scores) -> dict[str, Any]:
        ratio = _ratio(scores).detach()
        share = clipped_share(ratio, scores.advantage[:, None].expand_as(ratio), self.clip)
        return {"clipped": share}


def _ratio(scores: Scores) -> Tensor:
    """rho [N, K]."""
    difference = scores.weights * (scores.current - scores.old).sum(dim=2)
    difference = difference / scores.lengths[:, None]
    return torch.where(scores.advantage[:, None] < 0, difference.exp(), 1 + difference)
