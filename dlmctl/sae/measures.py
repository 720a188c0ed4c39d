"""How well an autoencoder gives activations back: sums over a stream of tokens.

fve        1 - sum |e|^2 / sum |x - mean|^2,                  e = xhat - x
fve_var    1 - sum_j Var(e_j) / sum_j Var(x_j), as in the published figures: a constant error
           is forgiven
fve_dim    the mean over dimensions of 1 - Var(e_j) / Var(x_j): no dimension counts more, and
           one without variance (`constant` is how many there are) not at all
fve_normal fve without tokens whose norm is above 10 times the median: a few of them can hold
           nearly all of the variance
nmse       sum |e|^2 / sum |x|^2
cos        mean cosine of x and xhat
l0         mean number of active latents
dead       share of the latents that were active on no token

None is a share of nothing: of the variance of a single token, or of tokens that are all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.topk import Codes, TopKSae

MASSIVE = 10.0
"""Times the median norm above which a token is left out of `fve_normal`."""
CONSTANT = 1e-6
"""Standard deviation of a dimension, by its root mean square, up to which it has no variance: what
rounding to float32 makes of a constant is below that."""


class _Moments:
    """Mean and spread of vectors by dimension, batch by batch (Chan, Golub and LeVeque 1983).

    Nothing cancels, as it does in sum x^2 - (sum x)^2 / N where the mean is large.
    """

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean, self.spread = torch.zeros(2, width, dtype=torch.float64)
        """[d] each; the spread is sum (x - mean)^2."""

    def add(self, rows: Tensor) -> None:
        """float64 [N, d]."""
        if not len(rows):
            return
        before, self.count = self.count, self.count + len(rows)
        mean = rows.mean(dim=0)
        within = (rows - mean).square().sum(dim=0).cpu()
        shift = mean.cpu() - self.mean
        self.mean += shift * (len(rows) / self.count)
        self.spread += within + shift.square() * (before * len(rows) / self.count)

    @property
    def squares(self) -> Tensor:
        """[d], sum x^2."""
        return self.spread + self.count * self.mean.square()

    @property
    def varies(self) -> Tensor:
        """bool [d], dimensions with variance."""
        return self.spread > CONSTANT**2 * self.squares


class _Fit:
    """Moments of activations and of their errors."""

    def __init__(self, width: int) -> None:
        self.x, self.e = _Moments(width), _Moments(width)

    def add(self, x: Tensor, error: Tensor) -> None:
        self.x.add(x)
        self.e.add(error)

    def explained(self, error: Tensor) -> float | None:
        """1 - sum of an error [d] / spread of the activations."""
        if not bool(self.x.varies.any()):
            return None
        return 1 - float(error.sum() / self.x.spread.sum())

    @property
    def fve_dim(self) -> float | None:
        varies = self.x.varies
        if not bool(varies.any()):
            return None
        return 1 - float((self.e.spread[varies] / self.x.spread[varies]).mean())

    @property
    def nmse(self) -> float | None:
        squares = float(self.x.squares.sum())
        return float(self.e.squares.sum()) / squares if squares else None


class Reconstruction:
    """The measures of an autoencoder."""

    def __init__(self, sae: TopKSae) -> None:
        self._all, self._normal = _Fit(sae.d_in), _Fit(sae.d_in)
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
        return self._all.x.count

    def row(self) -> dict[str, float | int | None]:
        """The measures; those above, and how many tokens they come from."""
        every, normal, count = self._all, self._normal, max(1, self.tokens)
        return {
            "tokens": self.tokens,
            "fve": every.explained(every.e.squares),
            "fve_var": every.explained(every.e.spread),
            "fve_dim": every.fve_dim,
            "constant": int((~every.x.varies).sum()),
            "fve_normal": normal.explained(normal.e.squares),
            "massive": self.tokens - normal.x.count,
            "nmse": every.nmse,
            "cos": self._cosines / count,
            "l0": self._active / count,
            "dead": float((~self._used).double().mean()),
        }
