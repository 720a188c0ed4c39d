"""The spectrum of U in the limit of many dimensions, from the saddle-point equations.

Bonnaire et al. 2025 (arXiv 2505.17638), for z in the upper half-plane, with Sigma's eigenvalues l,
A = a^2 e^-2t and c = psi_p / psi_n:

    K = 1 + c (A r + v^2 q)          r_hat = psi_p A / K          s_hat = psi_p b^2 + 1/q
    s = E[1 / (s_hat + l r_hat)]     r = E[l / (s_hat + l r_hat)]
    psi_p (s2 - z) + psi_p v^2 / K + (1 - psi_p)/q - s/q^2 = 0

q(z) = trace (U - z)^-1 / p is the Stieltjes transform, and its imaginary part on the real axis is
pi times the density. The unknowns here are r and w = 1/q, in which nothing is singular at w = 0.
Newton's method follows the solution from far above the axis, where w = -z, down to it, for all
points of a grid at once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.theory.random_features import Constants, constants
from dlmctl.settings.theory import FeatureModel

FAR = 1e3
"""Imaginary part at which the solution is known, in units of psi_p and the largest variance."""
NEAR = 1e-8
"""Imaginary part at which the density is read, in units of s2."""
APART = 1.02
"""Distance from the atom at s2, as a factor, from which on its width is not visible."""
RATIO = 0.6
"""Ratio of one imaginary part to the one before."""
STEPS = 30
"""Most steps of Newton's method."""
POINTS = 1500


class Density(NamedTuple):
    """Density of the eigenvalues except the atom at s2.

    With psi_p < psi_n there is no atom, and the parts are those that generalize and memorize, of
    masses 1/psi_p and 1 - 1/psi_p. If 1 + psi_n < psi_p it has three parts: the bulk that
    generalizes, of mass 1/psi_p; the bulk that memorizes, of mass (psi_n - 1)/psi_p; and directions
    that stand out only slightly from the null bulk, of mass 1/psi_p. The last two together are the
    psi_n/psi_p of the paper.
    """

    at: Tensor
    """float64 [points], rising."""
    values: Tensor
    """float64 [points], the density."""
    atom: float
    """Share of the eigenvalues that are s2."""
    s2: float

    def supports(self) -> list[tuple[float, float, float]]:
        """Lowest point, highest point and mass of each bulk, the lowest first."""
        weight = self.values * self.at
        outside = self.at < APART * self.s2
        inside = (weight > 1e-3 * weight[~outside].max()) & ~outside
        edges = torch.nonzero(inside[1:] != inside[:-1])[:, 0].tolist()
        bulks = []
        for low, high in zip(edges[::2], edges[1::2], strict=True):
            part = slice(low, high + 2)
            mass = float(torch.trapezoid(self.values[part], self.at[part]))
            bulks.append((float(self.at[low + 1]), float(self.at[high]), mass))
        return bulks


def density(model: FeatureModel, points: int = POINTS) -> Density:
    """The density on a grid, evenly spaced in the logarithm, from s2 to above the largest
    eigenvalue."""
    s2 = constants(model).s2
    ends = s2 * (1 + APART) / 2, 8 * model.psi_p * max(1.0, *model.eigenvalues)
    at = torch.logspace(*map(math.log10, ends), points, dtype=torch.float64)
    q = stieltjes(model, torch.complex(at, torch.full_like(at, NEAR * s2)))
    atom = max(0.0, 1 - (1 + model.psi_n) / model.psi_p)
    return Density(at, q.imag / math.pi, atom, s2)


def stieltjes(model: FeatureModel, z: Tensor) -> Tensor:
    """q(z) = trace (U - z)^-1 / p in the limit; z complex128 with positive imaginary parts."""
    known, spectrum = constants(model), torch.tensor(model.eigenvalues, dtype=torch.float64)
    height = (z.imag * 0 + FAR * model.psi_p * max(1.0, *model.eigenvalues)).maximum(z.imag)
    w = -torch.complex(z.real, height)
    r = model.data_variance / w
    while True:
        w, r = _newton(model, known, spectrum, torch.complex(z.real, height), w, r)
        if bool((height <= z.imag).all()):
            return 1 / w
        height = (RATIO * height).maximum(z.imag)


def _newton(
    model: FeatureModel, known: Constants, spectrum: Tensor, z: Tensor, w: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    for _ in range(STEPS):
        first, second, (a, b, c, d) = _equations(model, known, spectrum, z, w, r)
        determinant = a * d - b * c
        step_w = (d * first - b * second) / determinant
        step_r = (a * second - c * first) / determinant
        w, r = w - step_w, r - step_r
        if bool((step_w.abs() <= 1e-12 * w.abs()).all()):
            break
    return w, r


def _equations(
    model: FeatureModel, known: Constants, spectrum: Tensor, z: Tensor, w: Tensor, r: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The residuals of r and of the last equation above, and their derivatives by w and r."""
    psi_p, v2, c = model.psi_p, known.v2, model.psi_p / model.psi_n
    signal = known.a**2 * math.exp(-2 * model.time)
    # 1/K = w / N
    n = w * (1 + c * signal * r) + c * v2
    inverse, inverse_w, inverse_r = w / n, c * v2 / n**2, -c * signal * (w / n) ** 2
    hat, hat_w, hat_r = (psi_p * signal * x for x in (inverse, inverse_w, inverse_r))
    below = 1 / (psi_p * known.b**2 + w + spectrum[:, None] * hat)
    s = below.mean(0)
    t0, t1, t2 = ((spectrum[:, None] ** k * below**2).mean(0) for k in range(3))
    first = r - (spectrum[:, None] * below).mean(0)
    second = psi_p * (known.s2 - z) + psi_p * v2 * inverse + (1 - psi_p) * w - s * w**2
    derivatives = (
        t1 + t2 * hat_w,
        1 + t2 * hat_r,
        psi_p * v2 * inverse_w + (1 - psi_p) - 2 * s * w + w**2 * (t0 + t1 * hat_w),
        psi_p * v2 * inverse_r + w**2 * t1 * hat_r,
    )
    return first, second, derivatives
