"""Coupled-GRPO: the score of a token from a full mask and a complementary pair (arXiv 2506.20639).

Every token is scored with the whole completion masked, and once more in that half of a pair that
masks it, with t ~ U(0.2, 0.8) the share of the first half:

    s_it = (1/2) (log p(y_it | x) + w_it log p(y_it | y outside M, x))     w = 1/t or 1/(1 - t)
    L    = diffu-GRPO's loss with s in place of log p

that is, PPO's clip on exp(s - s_old) and k3 of s_ref - s, averaged over the tokens of the batch. w
follows the released code (apple/ml-diffucoder); s is then no log-probability, since the two weights
sum to more than 1. With n threes of masks s is their mean; of other laws it is the mean of
weight_k log p over the K masks.

Published for DiffuCoder: eps 0.5, beta 0.01, leave-one-out baseline, two steps on a batch, 10
completions for a prompt, lr 1e-6. Their reference follows the policy every 64 steps; ours is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from dlmctl.rl.objectives.diffu_grpo import DiffuGrpo
from dlmctl.rl.objectives.scores import Scores
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class CoupledGrpo(DiffuGrpo):
    """The objective `coupled-grpo`."""

    recipe: ClassVar[Recipe] = RECIPES["coupled-grpo"]

    def loss(self, scores: Scores) -> Tensor:
        return super().loss(_merged(scores))

    def metrics(self, scores: Scores) -> dict[str, Any]:
        return super().metrics(_merged(scores))


def _merged(scores: Scores) -> Scores:
    """One score s for each token, as if under a single mask: [N, 1, G]."""
    weights = scores.weights[:, :, None]

    def merged(log_probs: Tensor) -> Tensor:
        return (weights * log_probs).mean(dim=1, keepdim=True)

    return replace(
        scores,
        current=merged(scores.current),
        old=merged(scores.old),
        reference=merged(scores.reference),
        targets=scores.targets.any(dim=1, keepdim=True),
    )
