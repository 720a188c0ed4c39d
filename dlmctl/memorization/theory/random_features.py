"""The random-feature score network at one diffusion time: its constants, data and losses.

Bonnaire et al. 2025 (arXiv 2505.17638): x_t = e^-t x + sqrt(D) xi with D = 1 - e^-2t,
x ~ N(0, Sigma) and xi ~ N(0, I) in d dimensions. The score is s(y) = B phi(y), where
phi(y) = tanh(W y / sqrt(d)), W [p, d] is N(0, 1) and frozen, and B [d, p] is trained from 0 on
n samples under ever fresh noise:

    L(B) = E |sqrt(D) B phi(x_t) + xi|^2 / d

The sizes are psi_n = n/d and psi_p = p/d. All expectations over the noise, and over the population
of the test loss, are exact (`gaussian_features`); the published script draws them. Everything is in
the basis of the eigenvectors of U = E[phi phi^T] over the training set, where the flow is diagonal.

The noise may also be M draws for each sample that stay the same, so that U and E[phi xi^T] are
means over n M points. Losses are under all noise and data then, too. The score error is above that
of ever fresh noise by 1 / M, of the order of k / (n M D) where k directions are learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.theory.gaussian_features import feature_moments, normal_rule
from dlmctl.records.errors import UsageError

BULKS = ("gen", "mem", "null")
"""Groups of eigen-directions, by falling eigenvalue: d that generalize, n - d that memorize, and
p - n that change neither loss."""
BATCH = 2048
"""Noisy samples at once."""
LEAST_DRAWN = 2
"""Noisy samples for each feature, without which U of drawn noise is nearly singular."""


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
    draws: int = 0
    """Of the noise for each sample, over which U and the two products are means; 0 is all noise."""
    noise_seed: int = 0
    """Of the draws."""
    all_noise: tuple[Tensor, Tensor] | None = None
    """Of draws: E[phi phi^T], float64 [p, p], and E[phi xi^T], [p, d], under all noise."""


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


def draw_problem(setting: Setting, seed: int, draws: int = 0) -> Problem:
    """Random features and a training set, with the moments of both.

    Raises:
        UsageError: there are fewer than two noisy samples for each feature.
    """
    generator = torch.Generator().manual_seed(seed)
    p, n, d = setting.features, setting.samples, setting.dimension
    weights = torch.randn(p, d, dtype=torch.float64, generator=generator)
    data = torch.randn(n, d, dtype=torch.float64, generator=generator) * setting.spectrum().sqrt()
    return make_problem(setting, weights, data, draws, seed + 1)


def make_problem(
    setting: Setting, weights: Tensor, data: Tensor, draws: int = 0, noise_seed: int = 0
) -> Problem:
    """The same of given features [p, d] and data [n, d], float64."""
    least = math.ceil(LEAST_DRAWN * setting.features / len(data))
    if 0 < draws < least:
        raise UsageError(f"--draws {draws} are too few: at least {least}, or 0 for all noise")
    rows = weights / math.sqrt(setting.dimension)
    shrink, noise = math.exp(-setting.time), setting.noise
    loadings = math.sqrt(noise) * rows
    seen = feature_moments(shrink * rows @ data.T, loadings)
    whole = seen.second, seen.slope.mean(1, keepdim=True) * loadings
    second, noise_product, level = *whole, seen.level
    if draws:
        second, noise_product, level = _drawn_moments(setting, rows, data, draws, noise_seed)
    input_product = shrink * level @ data / len(data) + math.sqrt(noise) * noise_product
    spread = (shrink**2 * setting.spectrum() + noise).sqrt()
    fresh = feature_moments(torch.zeros_like(rows[:, :1]), rows * spread)
    values, vectors = torch.linalg.eigh(second)
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
        draws,
        noise_seed,
        (vectors.T @ whole[0] @ vectors, vectors.T @ whole[1]) if draws else None,
    )


def noisy_samples(
    setting: Setting, data: Tensor, draws: int, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """x_t and xi of every sample under each draw of the noise, in parts.

    Yields:
        Which samples, and x_t and xi as columns, float32 [d, b]. All parts of a draw come before
        those of the next.
    """
    generator = torch.Generator().manual_seed(seed)
    shrunk = (math.exp(-setting.time) * data).float()
    for _ in range(draws):
        for begin in range(0, len(data), BATCH):
            part = slice(begin, begin + BATCH)
            noise = torch.randn(shrunk[part].shape, generator=generator).T
            yield part, shrunk[part].T + math.sqrt(setting.noise) * noise, noise


def _drawn_moments(
    setting: Setting, rows: Tensor, data: Tensor, draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """E[phi phi^T], E[phi xi^T], and E[phi] of each sample, [p, n], over draws of the noise.

    Features are float32, whose rounding is far below the least eigenvalue.
    """
    p, n, d = setting.features, len(data), setting.dimension
    second, product, level = (torch.zeros(p, size, dtype=torch.float64) for size in (p, d, n))
    for part, y, noise in noisy_samples(setting, data, draws, seed):
        phi = torch.tanh(rows.float() @ y)
        second += phi @ phi.T
        product += phi @ noise.T
        level[:, part] += phi
    return second / (draws * n), product / (draws * n), level / draws


def losses(problem: Problem, network: Tensor) -> Losses:
    """Of the score s(y) = B phi(y); network is B in the eigenvectors of U, float64 [d, p]."""
    setting = problem.setting
    noise, d = setting.noise, setting.dimension
    product = problem.noise_product
    if problem.all_noise is None:
        train = noise * float((network**2 @ problem.values).sum())
    else:
        second, product = problem.all_noise
        train = noise * float(((network @ second) * network).sum())
    train += 2 * math.sqrt(noise) * float((network.T * product).sum())
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
