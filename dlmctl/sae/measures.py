"""How well an autoencoder gives activations back: sums over a stream of tokens.

fve        1 - sum |e|^2 / sum |x - mean|^2,                  e = xhat - x
fve_var    1 - sum_j Var(e_j) / sum_j Var(x_j), as in the published figures: a constant error
           is forgiven
fve_dim    the mean over dimensions of 1 - Var(e_j) / Var(x_j): no dimension counts more
fve_normal fve without tokens whose norm is above 10 times the median: a few of them can hold
           nearly all of the variance
nmse       sum |e|^2 / sum |x|^2
cos        mean cosine of x and xhat
l0         mean number of active latents
dead       share of the latents that were active on no token
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.topk import Codes, TopKSae

MASSIVE = 10.0
"""Times the median norm above which a token is left out of `fve_normal`."""


class _Moments:
    """Sums of activations and errors over tokens, by dimension."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.x, self.x2, self.e, self.e2 = torch.zeros(4, width, dtype=torch.float64)

    def add(self, x: Tensor, error: Tensor) -> None:
        self.count += len(x)
        for total, values in ((self.x, x), (self.x2, x * x), (self.e, error), (self.e2, error**2)):
            total += values.sum(dim=0).cpu()

    @property
    def spread(self) -> Tensor:
        """[d], sum of (x - mean)^2."""
        return (self.x2 - self.x**2 / max(1, self.count)).clamp(min=1e-30)

    @property
    def error_spread(self) -> Tensor:
        """[d], sum of (e - mean e)^2."""
        return self.e2 - self.e**2 / max(1, self.count)

    @property
    def fve(self) -> float:
        return 1 - float(self.e2.sum() / self.spread.sum())


class Reconstruction:
    """The measures of an autoencoder."""

    def __init__(self, sae: TopKSae) -> None:
        self._all, self._normal = _Moments(sae.d_in), _Moments(sae.d_in)
        self._cosines = self._active = 0.0
        self._used = torch.zeros(sae.d_sae, dtype=torch.bool)
        self._limit: float | None = None

    @torch.no_grad()
    def add(self, x: Tensor, made: Tensor, codes: Codes) -> None:
        """Count tokens.

        Args:
            x: activations [N, d].
            made: what the autoencoder makes of them, [N, d].
        """
        if not len(x):
            return
        x, made = x.double(), made.double()
        norms = x.norm(dim=1)
        if self._limit is None:  # of the first tokens, as a stream has no other median
            self._limit = MASSIVE * float(norms.median())
        normal = norms <= self._limit
        self._all.add(x, made - x)
        self._normal.add(x[normal], (made - x)[normal])
        self._cosines += float(functional.cosine_similarity(x, made, dim=1).sum())
        active = codes.values > 0
        self._active += float(active.sum())
        self._used[codes.indices[active].cpu()] = True

    @property
    def tokens(self) -> int:
        return self._all.count

    def row(self) -> dict[str, float | int]:
        """The measures; those above, and how many tokens they come from."""
        moments, count = self._all, max(1, self.tokens)
        return {
            "tokens": self.tokens,
            "fve": moments.fve,
            "fve_var": 1 - float(moments.error_spread.sum() / moments.spread.sum()),
            "fve_dim": 1 - float((moments.error_spread / moments.spread).mean()),
            "fve_normal": self._normal.fve,
            "massive": self.tokens - self._normal.count,
            "nmse": float(moments.e2.sum() / moments.x2.sum().clamp(min=1e-30)),
            "cos": self._cosines / count,
            "l0": self._active / count,
            "dead": float((~self._used).double().mean()),
        }
