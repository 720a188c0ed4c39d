"""GDSD: the log-ratio to the old policy regressed on the advantage (arXiv 2605.29398).

With D_j the difference of current and old log-probability over all L tokens, each token scored once
by a mask and its complement, and halved, for pair j:

    L = (1/N) sum_i sum_j (clamp(D_ij, log(1 - eps), log(1 + eps)) / L_i - psi A_i)^2
        + beta mean_ij (S_ij - S_ref_ij)^2 / (2 L_i)

where S is that same halved sum. The clamp acts on a sum over the sequence and eps is small, so that
the gradient of a sample ends as soon as its log-ratio has moved by 4e-4 nats either way.
Published: leave-one-out baseline, eps 4e-4, psi 10, beta 1e-3 (MATH: 1e-4), two pairs of masks as
in ESPO, 8 inner steps; the scripts for Sudoku and Countdown, called demos, have psi 1 and one pair.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dlmctl.records.errors import UsageError
from dlmctl.rl.objectives.scores import PenalizedRatios, Scores
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Gdsd(PenalizedRatios):
    """The objective `gdsd`."""

    clip: float
    beta: float
    psi: float

    recipe: ClassVar[Recipe] = RECIPES["gdsd"]

    def loss(self, scores: Scores) -> Tensor:
        if not _in_pairs(scores):
            raise UsageError(
                "gdsd scores every token once, by a mask and its complement: its masks come in "
                "pairs, --masks complementary or stratified"
            )
        lengths = scores.lengths[:, None]
        moved = _pair_sums(scores.current - scores.old)
        clamped = moved.clamp(math.log(1 - self.clip), math.log(1 + self.clip))
        distance = clamped / lengths - self.psi * scores.advantage[:, None]
        loss = (distance**2).sum(dim=1).mean()
        if self.beta > 0:
            away = _pair_sums(scores.current - scores.reference)
            loss = loss + self.beta * (away**2 / (2 * lengths)).mean()
        return loss

    def metrics(self, scores: Scores) -> dict[str, Any]:
        moved = _pair_sums(scores.current - scores.old).detach()
        out = (moved < math.log(1 - self.clip)) | (moved > math.log(1 + self.clip))
        return {"clipped": float(out.double().mean())}


def _in_pairs(scores: Scores) -> bool:
    """Whether masks 2j and 2j + 1 divide the scored tokens of each completion among them."""
    if scores.targets.shape[1] % 2:
        return False
    first, second = scores.targets[:, ::2], scores.targets[:, 1::2]
    counts = (first | second).sum(dim=2)
    return not bool((first & second).any()) and bool((counts == scores.lengths[:, None]).all())


def _pair_sums(values: Tensor) -> Tensor:
    """Half the sum over a mask and its complement: [N, K, G] to [N, K/2]."""
    return values.sum(dim=2).unflatten(1, (-1, 2)).sum(dim=2) / 2
