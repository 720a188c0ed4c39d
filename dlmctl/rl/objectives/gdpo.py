"""GDPO: one action per sequence, its likelihood the ELBO by quadrature (arXiv 2510.08554).

With ELBO scores s under masks at the nodes of Gauss-Legendre quadrature, which current, old and
reference policy share, and L_i scored tokens:

    rho_i = exp((s_i - s_old_i) / L_i)
    L     = -(1/N) sum_i min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i) + beta (1/N) sum_i k3_i
    k3_i  = exp(s_ref_i - s_i) - (s_ref_i - s_i) - 1

ESPO's loss with another penalty, which is not divided by L_i. Published: eps 0.5, beta 0, rewards
less their mean, 12 inner steps, 3 nodes (the default of its scripts). At level t the released code
masks exactly int(t L) tokens; the law `quadrature` masks each with probability t, so that the
score at a node has no bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dlmctl.rl.objectives.espo import Espo
from dlmctl.rl.objectives.scores import Scores
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Gdpo(Espo):
    """The objective `gdpo`."""

    recipe: ClassVar[Recipe] = RECIPES["gdpo"]

    def _penalty(self, scores: Scores) -> Tensor:
        away = scores.elbo(scores.reference - scores.current)
        return away.exp() - away - 1
