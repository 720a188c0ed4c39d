"""ESPO: one action per sequence, its likelihood the ELBO (arXiv 2512.03759).

With ELBO scores s under masks that current, old and reference policy share, L_i scored tokens:

    rho_i = exp((s_i - s_old_i) / L_i)
    L     = -(1/N) sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i)
            + beta (1/N) sum_i (s_i - s_ref_i)^2 / (2 L_i)

The division of the penalty by L_i is that of the released code; the paper prints it without.
Published: eps 0.2 (Countdown: 0), two coupled pairs of masks whose levels are spread evenly over a
device's batch (here: over the samples of a prompt), leave-one-out baseline, 8 inner steps, beta
1e-3 for mathematics, 3e-3 for Countdown, 1e-2 for Sudoku and code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dlmctl.rl.objectives.scores import PenalizedRatios, Scores, clipped_share, clipped_surrogate
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Espo(PenalizedRatios):
    """The objective `espo`."""

    clip: float
    beta: float

    recipe: ClassVar[Recipe] = RECIPES["espo"]

    def loss(self, scores: Scores) -> Tensor:
        surrogate = clipped_surrogate(self._ratio(scores), scores.advantage, self.clip)
        if self.beta == 0:
            return -surrogate.mean()
        return (self.beta * self._penalty(scores) - surrogate).mean()

    def metrics(self, scores: Scores) -> dict[str, Any]:
        ratio = self._ratio(scores).detach()
        return {"clipped": clipped_share(ratio, scores.advantage, self.clip)}

    def _penalty(self, scores: Scores) -> Tensor:
        """[N]."""
        away = scores.elbo(scores.current - scores.reference)
        return away**2 / (2 * scores.lengths)

    def _ratio(self, scores: Scores) -> Tensor:
        return (scores.elbo(scores.current - scores.old) / scores.lengths).exp()
