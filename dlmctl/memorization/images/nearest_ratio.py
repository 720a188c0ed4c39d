"""How many samples are copies of training data: ratio test, distance, similarity of features.

Every figure is a mean over samples, taken against a training set and against a held-out set of
equal size, which no sampler can have memorized: what both have in common is likeness, the excess
is memorization.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.memorization.images.neighbours import MEMORY, Neighbours, nearest
from dlmctl.records.errors import DataError

THRESHOLD = 1 / 3
_PART = 2**22
"""Draws of the bootstrap at once."""
_CHUNK = 512
"""References that are compared with each other at once."""


def ratios(neighbours: Neighbours) -> Tensor:
    """float64 [N]: distance to the nearest reference over that to the second nearest, d1 / d2.

    Where both are 0 the reference holds a copy twice, and the ratio is 1: it cannot tell.
    """
    first, second = neighbours.distances[:, 0], neighbours.distances[:, 1]
    return torch.where(second > 0, first / second, 1.0)


def memorized(neighbours: Neighbours, threshold: float = THRESHOLD) -> Tensor:
    """bool [N]: the ratio test, d1 / d2 below a threshold.

    Of Yoon et al. 2023 ("Diffusion probabilistic models generalize when they fail to memorize"),
    with L2 between pixels and 1/3 as in Gu et al. 2023 (arXiv 2310.02664) and Bonnaire et al. 2025
    (arXiv 2505.17638). References that repeat each other hide copies: see `distinct`.
    """
    return ratios(neighbours) < threshold


def similarities(
    samples: Tensor, references: Tensor, memory: int = MEMORY, device: torch.device | None = None
) -> Tensor:
    """float64 [N]: the largest cosine of a sample's features and a reference's.

    As in Somepalli et al. 2023 (arXiv 2212.03860), where the features are those of SSCD and a copy
    is above 0.5.

    Args:
        samples: float32 [N, F].
        references: float32 [M, F].

    Raises:
        DataError: the features of one are all 0.
    """
    if not all(bool(each.any(1).all()) for each in (samples, references)):
        raise DataError("features that are all 0 have no cosine")
    units = [functional.normalize(each, dim=1) for each in (samples, references)]
    distances = nearest(units[0], units[1], 1, memory, device).distances[:, 0]
    return 1 - distances.square() / 2


def distinct(references: Tensor, tolerance: float = 0.0, memory: int = MEMORY) -> Tensor:
    """int64 [M']: the references that are left without duplicates, in order.

    Going from the first to the last, a reference stays unless one that stays is equal to it, or
    within the tolerance.

    Args:
        references: float32 [M, D].
        tolerance: L2 distance up to which two references are one.
    """
    rows = (references + 0.0).cpu().contiguous().numpy()  # -0.0 becomes 0.0
    first: dict[bytes, int] = {}
    for number, row in enumerate(rows):
        first.setdefault(row.tobytes(), number)
    kept = torch.tensor(list(first.values()))
    if not tolerance:
        return kept
    stays: list[int] = []
    for part in kept.split(_CHUNK):
        new = references[part]
        free = torch.ones(len(part), dtype=torch.bool)
        if stays:
            free = nearest(new, references[stays], 1, memory).distances[:, 0] > tolerance
        exact = "donot_use_mm_for_euclid_dist"
        near = torch.cdist(new.double(), new.double(), compute_mode=exact).cpu() <= tolerance
        for number in range(len(part)):
            if free[number]:
                free[number + 1 :] &= ~near[number, number + 1 :]
        stays += part[free].tolist()
    return torch.tensor(stays)


def shared(references: Tensor, others: Tensor) -> int:
    """How many of the others are equal to a reference."""
    known = {row.tobytes() for row in (references + 0.0).cpu().contiguous().numpy()}
    return sum(row.tobytes() in known for row in (others + 0.0).cpu().contiguous().numpy())


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of the mean of independent values, by Efron's percentile bootstrap.

    The same seed draws the same places, so that values of the same samples are resampled together.
    A share of exactly 0 or 1 gets an interval without width; the share itself may still be up to
    about 3 / N away from it.
    """

    resamples: int = 1000
    confidence: float = 0.95
    seed: int = 0

    def interval(self, values: Tensor) -> tuple[float, float]:
        """Lower and upper end for the mean of float [N]."""
        return self._ends(self._means(values))

    def percentile(self, values: Tensor, quantile: float) -> tuple[float, float]:
        """Lower and upper end for a quantile of float [N]."""
        drawn = [values[places].quantile(quantile, dim=1) for places in self._places(len(values))]
        return self._ends(torch.cat(drawn))

    def _means(self, values: Tensor) -> Tensor:
        values = values.double().cpu()
        return torch.cat([values[places].mean(1) for places in self._places(len(values))])

    def _ends(self, found: Tensor) -> tuple[float, float]:
        tail = (1 - self.confidence) / 2
        low, high = found.quantile(torch.tensor([tail, 1 - tail], dtype=found.dtype)).tolist()
        return low, high

    def _places(self, count: int) -> Iterator[Tensor]:
        """int64 [R, N], parts of all resamples."""
        generator = torch.Generator().manual_seed(self.seed)
        left, size = self.resamples, max(1, _PART // count)
        while left:
            yield torch.randint(count, (min(size, left), count), generator=generator)
            left -= min(size, left)
