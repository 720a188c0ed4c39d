"""The random-feature score network at one diffusion time: its constants, data and losses.

Bonnaire et al. 2025 (arXiv 2505.17638): x_t = e^-t x + sqrt(D) xi with D = 1 - e^-2t,
x ~ N(0, Sigma) and xi ~ N(0, I) in d dimensions. The score is s(y) = B phi(y), where
phi(y) = tanh(W y / sqrt(d)), W [p, d] is N(0, 1) and frozen, and B [d, p] is trained from 0 on
n samples under ever fresh noise:

    L(B) = E |sqrt(D) B phi(x_t) + xi|^2 / d

The sizes are psi_n = n/d and psi_p = p/d. All expectations over the noise, and over the population
of the test loss, are exact (`gaussian_features`); the published script draws them. Everything is in
the basis of the eigenvectors of U = E[phi phi^T] over the training set, where the flow is diagonal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.consistency.gaussian_features import feature_moments, normal_rule
from dlmctl.records.errors import UsageError

BULKS = ("gen", "mem", "null")
"""Groups of eigen-directions, by falling eigenvalue: d that generalize, n - d that memorize, and
p - n that change neither loss."""


@dataclass(frozen=True)
class Setting:
    """Sizes, time and data of the model."""

    psi_n: float
    psi_p: float
    dimension: int
    time: float
    variances: tuple[float, ...] = (1.0,)
    """Eigenvalues of Sigma, in equal shares."""

    def __post_init__(self) -> None:
        if not self.dimension < self.samples < self.features:
            raise UsageError(
                f"--psi-n {self.psi_n:g} and --psi-p {self.psi_p:g}: "
                "the bulks are apart only where 1 < psi-n < psi-p"
            )
        if not 0 < self.time < math.inf:
            raise UsageError(f"--time {self.time:g} is not a number above 0")
        if min(self.variances) <= 0 or self.dimension < 2 * len(self.variances):
            raise UsageError(
                "--variances are positive numbers, at most one for two of the --dimension"
            )

    @property
    def samples(self) -> int:
        """n."""
        return round(self.psi_n * self.dimension)

    @property
    def features(self) -> int:
        """p."""
        return round(self.psi_p * self.dimension)

    @property
    def noise(self) -> float:
        """D, the variance of the noise."""
        return noise_variance(self.time)

    @property
    def data_variance(self) -> float:
        """trace(Sigma) / d."""
        return sum(self.variances) / len(self.variances)

    def spectrum(self) -> Tensor:
        """Eigenvalues of Sigma, float64 [d]."""
        shares = torch.arange(self.dimension) * len(self.variances) // self.dimension
        return torch.tensor(self.variances, dtype=torch.float64)[shares]

    def bulks(self) -> dict[str, slice]:
        """Ranks of the eigenvalues of each bulk, the largest first."""
        d, n, p = self.dimension, self.samples, self.features
        return dict(zip(BULKS, (slice(0, d), slice(d, n), slice(n, p)), strict=True))


class Constants(NamedTuple):
    """Of the Gaussian equivalent of U, with Omega [p, n] of N(0, 1):

    U ~ G G^T / n + b^2 W W^T / d + s2 I,    G = e^-t a W X / sqrt(d) + v Omega
    """

    a: float
    """E[tanh'(h)], h a pre-activation."""
    b: float
    """sqrt(D) a."""
    v2: float
    """Variance over the data of the mean over the noise, less its linear part."""
    s2: float
    """What is left of the variance of a feature: the eigenvalue of the null bulk."""


class Problem(NamedTuple):
    """A draw of the model; matrices over features are in the eigenvectors of U."""

    setting: Setting
    weights: Tensor
    """float64 [p, d], W."""
    data: Tensor
    """float64 [n, d]."""
    vectors: Tensor
    """float64 [p, p], the eigenvectors of U as columns, by falling eigenvalue."""
    values: Tensor
    """float64 [p], the eigenvalues of U."""
    noise_product: Tensor
    """float64 [p, d], E[phi xi^T] over the training set."""
    input_product: Tensor
    """float64 [p, d], E[phi x_t^T] over the training set."""
    population: Tensor
    """float64 [p, p], E[phi phi^T] over fresh data."""
    slope: Tensor
    """float64 [p, d], E[phi y^T] Gamma^-1 over fresh y ~ N(0, Gamma)."""


class Losses(NamedTuple):
    """Per dimension."""

    train: float
    test: float
    score_err: float
    """E|s(y) - true score|^2 / d over fresh y."""


def noise_variance(time: float) -> float:
    """D = 1 - e^-2t."""
    return -math.expm1(-2 * time)


def constants(setting: Setting) -> Constants:
    """By quadrature."""
    shrunk = math.exp(-setting.time) * math.sqrt(setting.data_variance)
    noise = setting.noise
    total = math.sqrt(shrunk**2 + noise)
    nodes, weights = normal_rule(total)
    values = torch.tanh(total * nodes)
    a = float((values * nodes) @ weights) / total
    smooth = torch.tanh(shrunk * nodes[:, None] + math.sqrt(noise) * nodes) @ weights
    v2 = float(smooth**2 @ weights) - (a * shrunk) ** 2
    s2 = float(values**2 @ weights) - (a * total) ** 2 - v2
    return Constants(a, math.sqrt(noise) * a, v2, s2)


def draw_problem(setting: Setting, seed: int) -> Problem:
    """Random features and a training set, with the moments of both."""
    generator = torch.Generator().manual_seed(seed)
    p, n, d = setting.features, setting.samples, setting.dimension
    weights = torch.randn(p, d, dtype=torch.float64, generator=generator)
    data = torch.randn(n, d, dtype=torch.float64, generator=generator) * setting.spectrum().sqrt()
    return make_problem(setting, weights, data)


def make_problem(setting: Setting, weights: Tensor, data: Tensor) -> Problem:
    """The same of given features [p, d] and data [n, d], float64."""
    rows = weights / math.sqrt(setting.dimension)
    shrink, noise = math.exp(-setting.time), setting.noise
    loadings = math.sqrt(noise) * rows
    seen = feature_moments(shrink * rows @ data.T, loadings)
    noise_product = seen.slope.mean(1, keepdim=True) * loadings
    input_product = shrink * seen.level @ data / len(data) + math.sqrt(noise) * noise_product
    spread = (shrink**2 * setting.spectrum() + noise).sqrt()
    fresh = feature_moments(torch.zeros_like(rows[:, :1]), rows * spread)
    values, vectors = torch.linalg.eigh(seen.second)
    vectors = vectors.flip(1).contiguous()
    return Problem(
        setting,
        weights,
        data,
        vectors,
        values.flip(0),
        vectors.T @ noise_product,
        vectors.T @ input_product,
        vectors.T @ fresh.second @ vectors,
        vectors.T @ (fresh.slope * rows),
    )


def losses(problem: Problem, network: Tensor) -> Losses:
    """Of the score s(y) = B phi(y); network is B in the eigenvectors of U, float64 [d, p]."""
    setting = problem.setting
    noise, d = setting.noise, setting.dimension
    train = noise * float((network**2 @ problem.values).sum())
    train += 2 * math.sqrt(noise) * float((network.T * problem.noise_product).sum())
    error = float(((network @ problem.population) * network).sum())
    error += 2 * float((network.T * problem.slope).sum())
    fisher = float((1 / (math.exp(-2 * setting.time) * setting.spectrum() + noise)).sum()) / d
    # The loss on fresh data is the error of the score and what no score can foretell of the noise.
    return Losses(
        1 + train / d, 1 - noise * fisher + noise * (fisher + error / d), fisher + error / d
    )


def norms(problem: Problem, network: Tensor) -> dict[str, float]:
    """Frobenius norm of B within each bulk."""
    return {name: float(network[:, part].norm()) for name, part in problem.setting.bulks().items()}
