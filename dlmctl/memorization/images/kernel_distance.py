"""KID: the maximum mean discrepancy of a cubic kernel (Bińkowski et al. 2018, arXiv 1801.01401).

k(x, y) = (x.y / D + 1)^3, unbiased, as the mean over random subsets of both sets. Unlike a Fréchet
distance it does not depend on how many images there are, and it may be negative.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy
import torch
from torch import Tensor


class KernelDistance(NamedTuple):
    """Over the subsets."""

    mean: float
    std: float
    """Standard deviation over the subsets, which torch-fidelity prints after ±. They overlap: it
    is no standard error of the mean."""


def kernel_distance(
    samples: Tensor, references: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID of two sets.

    With the same seed the subsets are those of torch-fidelity, if both sets have `size` vectors.

    Args:
        samples: float64 [N, D].
        references: float64 [M, D].
        size: vectors of a subset, drawn without replacement; N or M if these are fewer.
    """
    size = min(size, len(samples), len(references))
    generator = numpy.random.RandomState(seed)
    values = numpy.empty(subsets)
    for number in range(subsets):
        x, y = (
            each[torch.from_numpy(generator.choice(len(each), size, replace=False)).to(each.device)]
            for each in (samples, references)
        )
        values[number] = cubic_discrepancy(x, y)
    return KernelDistance(float(values.mean()), float(values.std()))


def cubic_discrepancy(x: Tensor, y: Tensor) -> float:
    """Unbiased squared MMD of float64 [n, D] and [n, D] under the cubic kernel."""
    n, width = x.shape
    within = 0.0
    for each in (x, y):
        kernel = (each @ each.T / width + 1).pow(3)
        within += float(kernel.sum() - kernel.diagonal().sum()) / (n * (n - 1))
    return within - 2 * float((x @ y.T / width + 1).pow(3).mean())
