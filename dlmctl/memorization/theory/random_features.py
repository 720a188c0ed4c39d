"""The random-feature score network at one diffusion time: its constants, data and losses.

Bonnaire et al. 2025 (arXiv 2505.17638): x_t = e^-t x + sqrt(D) xi with D = 1 - e^-2t,
x ~ N(0, Sigma) and xi ~ N(0, I) in d dimensions. The score is s(y) = B phi(y), where
phi(y) = tanh(W y / sqrt(d)), W [p, d] is N(0, 1) and frozen, and B [d, p] is trained from 0 on
n samples under fresh noise at every step:

    L(B) = E |sqrt(D) B phi(x_t) + xi|^2 / d

The sizes are psi_n = n/d and psi_p = p/d. All expectations over the noise, and over the population
of the test loss, are exact (`gaussian_features`); the published script draws them. Everything is in
the basis of the eigenvectors of U = E[phi phi^T] over the training set, in which the flow is
diagonal.

The noise may also be M fixed draws for each sample, so that U and E[phi xi^T] are means over n M
points. Losses are still under all noise and data. The score error then exceeds that of fresh noise
in proportion to 1 / M, by an amount of the order of k / (n M D) if k directions are learned.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.theory.gaussian_features import feature_moments, normal_rule
from dlmctl.records.errors import UsageError
from dlmctl.settings.theory import FeatureModel

BATCH = 2048
"""Noisy samples at once."""
LEAST_DRAWN = 2
"""Noisy samples per feature below which U of drawn noise is nearly singular."""


class Constants(NamedTuple):
    """Constants of the Gaussian equivalent of U, with Omega [p, n] of N(0, 1):

    U ~ G G^T / n + b^2 W W^T / d + s2 I,    G = e^-t a W X / sqrt(d) + v Omega
    """

    a: float
    """E[tanh'(h)], h a pre-activation."""
    b: float
    """sqrt(D) a."""
    v2: float
    """Variance over the data of the mean over the noise, less its linear part."""
    s2: float
    """The rest of the variance of a feature: the eigenvalue of the null bulk."""


class Problem(NamedTuple):
    """A draw of the model; matrices over features are in the eigenvectors of U."""

    model: FeatureModel
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
    """Draws of the noise per sample, over which U and the two products are means; 0: all noise."""
    noise_seed: int = 0
    """Seed of the draws."""
    all_noise: tuple[Tensor, Tensor] | None = None
    """If there are draws: E[phi phi^T], float64 [p, p], and E[phi xi^T], [p, d], under all noise.
    """


class Losses(NamedTuple):
    """Losses per dimension."""

    train: float
    test: float
    score_err: float
    """E|s(y) - true score|^2 / d over fresh y."""


def data_spectrum(model: FeatureModel) -> Tensor:
    """Eigenvalues of Sigma, float64 [d]."""
    shares = torch.arange(model.dimension) * len(model.eigenvalues) // model.dimension
    return torch.tensor(model.eigenvalues, dtype=torch.float64)[shares]


def constants(model: FeatureModel) -> Constants:
    """The constants of a model, by quadrature."""
    shrunk = math.exp(-model.time) * math.sqrt(model.data_variance)
    noise = model.noise
    total = math.sqrt(shrunk**2 + noise)
    nodes, weights = normal_rule(total)
    values = torch.tanh(total * nodes)
    a = float((values * nodes) @ weights) / total
    smooth = torch.tanh(shrunk * nodes[:, None] + math.sqrt(noise) * nodes) @ weights
    v2 = float(smooth**2 @ weights) - (a * shrunk) ** 2
    s2 = float(values**2 @ weights) - (a * total) ** 2 - v2
    return Constants(a, math.sqrt(noise) * a, v2, s2)


def draw_problem(model: FeatureModel, seed: int, draws: int = 0) -> Problem:
    """Draw random features and a training set, with the moments of both.

    Raises:
        UsageError: there are draws, but fewer than two noisy samples per feature.
    """
    generator = torch.Generator().manual_seed(seed)
    p, n, d = model.features, model.samples, model.dimension
    weights = torch.randn(p, d, dtype=torch.float64, generator=generator)
    data = torch.randn(n, d, dtype=torch.float64, generator=generator) * data_spectrum(model).sqrt()
    return make_problem(model, weights, data, draws, seed + 1)


def make_problem(
    model: FeatureModel, weights: Tensor, data: Tensor, draws: int = 0, noise_seed: int = 0
) -> Problem:
    """The problem of these features [p, d] and data [n, d], float64; raises as `draw_problem`."""
    least = math.ceil(LEAST_DRAWN * model.features / len(data))
    if 0 < draws < least:
        raise UsageError(f"--draws {draws} are too few: at least {least}, or 0 for all noise")
    rows = weights / math.sqrt(model.dimension)
    shrink, noise = math.exp(-model.time), model.noise
    loadings = math.sqrt(noise) * rows
    seen = feature_moments(shrink * rows @ data.T, loadings)
    whole = seen.second, seen.slope.mean(1, keepdim=True) * loadings
    second, noise_product, level = *whole, seen.level
    if draws:
        second, noise_product, level = _drawn_moments(model, rows, data, draws, noise_seed)
    input_product = shrink * level @ data / len(data) + math.sqrt(noise) * noise_product
    spread = (shrink**2 * data_spectrum(model) + noise).sqrt()
    fresh = feature_moments(torch.zeros_like(rows[:, :1]), rows * spread)
    values, vectors = torch.linalg.eigh(second)
    vectors = vectors.flip(1).contiguous()
    return Problem(
        model,
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
    model: FeatureModel, data: Tensor, draws: int, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """x_t and xi of every sample under each draw of the noise, in parts.

    Yields:
        The places of the samples, and x_t and xi as columns, float32 [d, b]. All parts of a draw
        come before those of the next.
    """
    generator = torch.Generator().manual_seed(seed)
    shrunk = (math.exp(-model.time) * data).float()
    for _ in range(draws):
        for begin in range(0, len(data), BATCH):
            part = slice(begin, begin + BATCH)
            noise = torch.randn(shrunk[part].shape, generator=generator).T
            yield part, shrunk[part].T + math.sqrt(model.noise) * noise, noise


def _drawn_moments(
    model: FeatureModel, rows: Tensor, data: Tensor, draws: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """E[phi phi^T], E[phi xi^T], and E[phi] of each sample, [p, n], over draws of the noise.

    Features are float32, whose rounding is far below the least eigenvalue.
    """
    p, n, d = model.features, len(data), model.dimension
    second, product, level = (torch.zeros(p, size, dtype=torch.float64) for size in (p, d, n))
    for part, y, noise in noisy_samples(model, data, draws, seed):
        phi = torch.tanh(rows.float() @ y)
        second += phi @ phi.T
        product += phi @ noise.T
        level[:, part] += phi
    return second / (draws * n), product / (draws * n), level / draws


def losses(problem: Problem, network: Tensor) -> Losses:
    """Losses of the score s(y) = B phi(y), with B in the eigenvectors of U, float64 [d, p]."""
    model = problem.model
    noise, d = model.noise, model.dimension
    product = problem.noise_product
    if problem.all_noise is None:
        train = noise * float((network**2 @ problem.values).sum())
    else:
        second, product = problem.all_noise
        train = noise * float(((network @ second) * network).sum())
    train += 2 * math.sqrt(noise) * float((network.T * product).sum())
    error = float(((network @ problem.population) * network).sum())
    error += 2 * float((network.T * problem.slope).sum())
    fisher = float((1 / (math.exp(-2 * model.time) * data_spectrum(model) + noise)).sum()) / d
    # The loss on fresh data is the error of the score and the part of the noise that no score can
    # predict.
    return Losses(
        1 + train / d, 1 - noise * fisher + noise * (fisher + error / d), fisher + error / d
    )


def norms(problem: Problem, network: Tensor) -> dict[str, float]:
    """Frobenius norm of B within each bulk."""
    return {name: float(network[:, part].norm()) for name, part in problem.model.bulks().items()}
