"""Moments of the features tanh(h) for Gaussian h, without random draws.

With normalized Hermite polynomials H_k and h = m + s z, z ~ N(0, 1), let c_k = E[tanh(h) H_k(z)].
For two features whose z have correlation r (Mehler's formula)

    E[tanh(h_i) tanh(h_j)] = sum_k r^k c_k(m_i, s_i) c_k(m_j, s_j)

so that a covariance over all noise takes a few matrix products. Draws of the noise would have to be
some 20 per feature and still be off by several per cent in the directions of least variance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-12
"""Size up to which terms of the series are left out."""
QUADRATURE = 1e-15
"""Exponential part of a quadrature's error, which is some hundred times as large."""
NODES = (40, 400)
"""Least and largest number of nodes of a quadrature."""
BATCH_BYTES = 1 << 26


class FeatureMoments(NamedTuple):
    """Expectations over z of phi = tanh(mean + loadings z)."""

    second: Tensor
    """float64 [p, p], E[phi phi^T], the mean over all samples."""
    level: Tensor
    """float64 [p, n], E[phi]."""
    slope: Tensor
    """float64 [p, n], E[tanh'(h)]; E[phi z^T] is slope x loadings, by Stein's lemma."""


def normal_rule(scale: float) -> tuple[Tensor, Tensor]:
    """Nodes and weights, float64, of Gauss-Hermite quadrature under N(0, 1) for tanh(scale z).

    From the eigenvectors of the Jacobi matrix (Golub and Welsch 1969). The poles of tanh at
    +-i pi/2 leave an error of exp(-pi sqrt(nodes) / scale).
    """
    least, most = NODES
    wanted = math.ceil((math.log(1 / QUADRATURE) * scale / math.pi) ** 2)
    count = min(max(wanted, least), most)
    off = torch.arange(1, count, dtype=torch.float64).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return nodes, vectors[0] ** 2


def feature_moments(mean: Tensor, loadings: Tensor) -> FeatureMoments:
    """Moments of p features of n samples under Gaussian noise.

    Args:
        mean: float64 [p, n].
        loadings: float64 [p, d], none of its rows 0; z ~ N(0, I_d).
    """
    scale = loadings.norm(dim=1)
    directions = loadings / scale[:, None]
    correlation = (directions @ directions.T).clamp(-1, 1).fill_diagonal_(0)
    closest = float(correlation.abs().max())
    nodes, weights = normal_rule(float(scale.max()))
    basis = _hermite(nodes, len(nodes) // 2) * weights
    second = torch.zeros_like(correlation)
    levels, slopes = [], []
    size = max(1, BATCH_BYTES // (8 * len(mean) * len(nodes)))
    for part in mean.split(size, dim=1):
        values = torch.tanh(part[..., None] + scale[:, None, None] * nodes)
        terms = (values @ basis.T).permute(2, 0, 1).contiguous()
        square = (values**2) @ weights
        second += _series(terms, square, correlation, closest)
        levels.append(terms[0])
        slopes.append(terms[1] / scale[:, None])
    return FeatureMoments(second / mean.shape[1], torch.cat(levels, 1), torch.cat(slopes, 1))


def _hermite(nodes: Tensor, terms: int) -> Tensor:
    """H_k at the nodes for k below terms, normalized under N(0, 1); [terms, nodes]."""
    rows = [torch.ones_like(nodes), nodes]
    for k in range(1, terms - 1):
        rows.append((nodes * rows[k] - k**0.5 * rows[k - 1]) / (k + 1) ** 0.5)
    return torch.stack(rows)


def _series(terms: Tensor, square: Tensor, correlation: Tensor, closest: float) -> Tensor:
    """Sum over the samples of a batch; terms [K, p, b], square [p, b] is E[phi^2]."""
    power = torch.ones_like(correlation)
    total = torch.zeros_like(correlation)
    for k, term in enumerate(terms):
        # By Cauchy-Schwarz the rest is at most r^k times the variance left in a feature.
        left = float((square - (terms[:k] ** 2).sum(0)).max())
        if closest**k * left < TOLERANCE:
            break
        if float(term.abs().max()) > TOLERANCE:  # with a mean of 0 every second term is 0
            total += power * (term @ term.T)
        power = power * correlation
    total.diagonal().copy_(square.sum(1))  # r = 1 there, and the whole series is E[phi^2]
    return total
