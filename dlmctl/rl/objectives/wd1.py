"""wd1: weighted log-likelihood without ratios (arXiv 2507.08838).

With the mean-field score s_i = sum_t log p(y_it | x), everything masked, and for each group

    w_i^+ = softmax(A)_i        w_i^- = softmax(-A)_i
    L     = -sum_i (w_i^+ - w_i^-) s_i

which neither an old policy nor a reference enters; the mean over the groups of a batch. The weights
of a group sum to zero. Published: one full mask, prompt mask 0.15, 12 inner steps (Sudoku: 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dlmctl.rl.objectives.scores import Needs, Scores
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Wd1:
    """The objective `wd1`."""

    recipe: ClassVar[Recipe] = RECIPES["wd1"]

    @property
    def needs(self) -> Needs:
        return "nothing"

    @property
    def needs_reference(self) -> bool:
        return False

    def loss(self, scores: Scores) -> Tensor:
        weights = torch.zeros_like(scores.advantage)
        groups = scores.prompt.unique()
        for group in groups:
            members = scores.prompt == group
            advantage = scores.advantage[members]
            weights[members] = advantage.softmax(0) - (-advantage).softmax(0)
        likelihood = scores.current.sum(dim=2).mean(dim=1)
        return -(weights * likelihood).sum() / len(groups)

    def metrics(self, scores: Scores) -> dict[str, Any]:
        return {}
