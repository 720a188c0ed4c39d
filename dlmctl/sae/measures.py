"""How well an autoencoder reconstructs activations: measures summed over a stream of tokens.

With the error e = xhat - x:

fve        1 - sum |e|^2 / sum |x - mean|^2
fve_var    1 - sum_j Var(e_j) / sum_j Var(x_j), as in the published figures: it forgives a constant
           error
fve_dim    mean over dimensions of 1 - Var(e_j) / Var(x_j): every dimension counts the same, except
           that those without variance (`constant` is their number) are left out
fve_normal fve without tokens whose norm is above 10 times the median: a few such tokens (`massive`)
           can have nearly all of the variance
nmse       sum |e|^2 / sum |x|^2
cos        mean cosine of x and xhat
l0         mean number of active latents
dead       share of the latents that were active on no token

None is a share of nothing: of the variance of a single token, or of tokens that are all the same.

A new measure is a class like `Cosine`, and its name in `MEASURES`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.topk import Codes, TopKSae

MASSIVE = 10.0
"""Times the median norm above which a token is left out of `fve_normal`."""
CONSTANT = 1e-6
"""A dimension whose standard deviation is at most this share of its root mean square has no
variance; rounding a constant to float32 stays below that."""


class Measure(Protocol):
    """One or more numbers about an autoencoder."""

    def __init__(self, sae: TopKSae) -> None: ...

    def add(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        """Take in tokens: activations float64 [N, d], N > 0, their reconstructions, their codes."""

    def row(self) -> dict[str, Any]:
        """The numbers by name."""


class _Moments:
    """Mean and spread of vectors by dimension, batch by batch (Chan, Golub and LeVeque 1983).

    Nothing cancels, as it would in sum x^2 - (sum x)^2 / N with a large mean.
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


class Variance:
    """The variance explained, by all definitions, and NMSE."""

    def __init__(self, sae: TopKSae) -> None:
        self._x, self._e = _Moments(sae.d_in), _Moments(sae.d_in)
        self._normal_x, self._normal_e = _Moments(sae.d_in), _Moments(sae.d_in)
        self._limit: float | None = None

    def add(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        norms, error = x.norm(dim=1), reconstruction - x
        if self._limit is None:  # from the first tokens, since a stream has no median
            self._limit = MASSIVE * float(norms.median())
        normal = norms <= self._limit
        self._x.add(x)
        self._e.add(error)
        self._normal_x.add(x[normal])
        self._normal_e.add(error[normal])

    def row(self) -> dict[str, Any]:
        x, e, varies = self._x, self._e, self._x.varies
        squares = float(x.squares.sum())
        by_dimension = e.spread[varies] / x.spread[varies]
        return {
            "tokens": x.count,
            "fve": _explained(e.squares, x),
            "fve_var": _explained(e.spread, x),
            "fve_dim": 1 - float(by_dimension.mean()) if len(by_dimension) else None,
            "constant": int((~varies).sum()),
            "fve_normal": _explained(self._normal_e.squares, self._normal_x),
            "massive": x.count - self._normal_x.count,
            "nmse": float(e.squares.sum()) / squares if squares else None,
        }


def _explained(error: Tensor, x: _Moments) -> float | None:
    """1 - sum of an error [d] / spread of the activations."""
    return 1 - float(error.sum() / x.spread.sum()) if bool(x.varies.any()) else None


class Cosine:
    """`cos`."""

    def __init__(self, sae: TopKSae) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        self._sum += float(functional.cosine_similarity(x, reconstruction, dim=1).sum())
        self._tokens += len(x)

    def row(self) -> dict[str, Any]:
        return {"cos": self._sum / max(1, self._tokens)}


class Firing:
    """`l0` and `dead`."""

    def __init__(self, sae: TopKSae) -> None:
        self._used = torch.zeros(sae.d_sae, dtype=torch.bool)
        self._active, self._tokens = 0.0, 0

    def add(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        active = codes.values > 0  # [N, K]
        self._active += float(active.sum())
        self._used[codes.indices[active].cpu()] = True
        self._tokens += len(x)

    def row(self) -> dict[str, Any]:
        dead = float((~self._used).double().mean())
        return {"l0": self._active / max(1, self._tokens), "dead": dead}


MEASURES: tuple[type[Measure], ...] = (Variance, Cosine, Firing)
"""In the order of a record."""


class Reconstruction:
    """All measures of an autoencoder."""

    def __init__(self, sae: TopKSae) -> None:
        self.tokens = 0
        self._measures = [measure(sae) for measure in MEASURES]

    @torch.no_grad()
    def add(self, x: Tensor, reconstruction: Tensor, codes: Codes) -> None:
        """Take in tokens: activations [N, d], their reconstructions and their codes."""
        self.tokens += len(x)
        if len(x):
            x, reconstruction = x.double(), reconstruction.double()
            for measure in self._measures:
                measure.add(x, reconstruction, codes)

    def row(self) -> dict[str, Any]:
        """The numbers of all measures by name."""
        return {name: n for measure in self._measures for name, n in measure.row().items()}
