"""GDSD: the log-ratio to the old policy regressed on the advantage (arXiv 2605.29398).

With D_j the difference of current and old log-probability over all L tokens, each token scored once
by a mask and its complement, and halved, for pair j:

    L = (1/N) sum_i sum_j (clamp(D_ij, log(1 - eps), log(1 + eps)) / L_i - psi A_i)^2
        + beta mean_ij (S_ij - S_ref_ij)^2 / (2 L_i)

where S is that same halved sum. The clamp acts on a sum over the sequence and eps is small, so that
the gradient of a sample ends as soon as its log-ratio has moved by 4e-4 nats either way.
Published: eps 4e-4, psi 1 (up to 10), beta 1e-3 or 1e-4, two pairs of masks as in ESPO, 8 inner
steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dlmctl.records.errors import UsageError
from dlmctl.rl.scores import Needs, Recipe, Scores


@dataclass(frozen=True)
class Gdsd:
    """The objective `gdsd`."""

    clip: float = 4e-4
    beta: float = 1e-3
    psi: float = 1.0

    recipe: ClassVar[Recipe] = Recipe(law="complementary", samples=4, inner=8)

    @property
    def needs(self) -> Needs:
        return "ratios"

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    def loss(self, scores: Scores) -> Tensor:
        if scores.current.shape[1] % 2:
            raise UsageError("gdsd scores every token once: it needs masks in pairs")
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


def _pair_sums(values: Tensor) -> Tensor:
    """Half the sum over a mask and its complement: [N, K, G] to [N, K/2]."""
    return values.sum(dim=2).unflatten(1, (-1, 2)).sum(dim=2) / 2
