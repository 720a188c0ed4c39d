"""Intervals of statistics of independent values, by Efron's percentile bootstrap.

A share of exactly 0 or 1 gets an interval of width 0; the true share may still be up to about 3 / N
away from it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dlmctl.settings.memorization import Bootstrap

PART = 2**22
"""Draws at once."""


def mean_interval(values: Tensor, bootstrap: Bootstrap) -> tuple[float, float]:
    """Lower and upper end for the mean of float [N]."""
    means = resampled(values.double().cpu(), lambda drawn: drawn.mean(1), bootstrap)
    return interval_ends(means, bootstrap.confidence)


def quantile_interval(values: Tensor, quantile: float, bootstrap: Bootstrap) -> tuple[float, float]:
    """Lower and upper end for a quantile of float [N]."""
    quantiles = resampled(values, lambda drawn: drawn.quantile(quantile, dim=1), bootstrap)
    return interval_ends(quantiles, bootstrap.confidence)


def resampled(
    values: Tensor, statistic: Callable[[Tensor], Tensor], bootstrap: Bootstrap
) -> Tensor:
    """A statistic of R resamples of float [N]; it maps float [r, N] to [r]."""
    generator = torch.Generator().manual_seed(bootstrap.seed)
    left, size, parts = bootstrap.resamples, max(1, PART // len(values)), []
    while left:
        places = torch.randint(len(values), (min(size, left), len(values)), generator=generator)
        parts.append(statistic(values[places]))
        left -= len(places)
    return torch.cat(parts)


def drawn_counts(units: int, resamples: int, seed: int) -> Tensor:
    """How often each unit comes in each of R resamples, float64 [R, units].

    With sums of units [units, ...], `counts @ sums` are the sums of the resamples.
    """
    places = torch.randint(units, (resamples, units), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(resamples, units, dtype=torch.float64)
    return counts.scatter_add_(1, places, torch.ones_like(counts))


def interval_ends(statistics: Tensor, confidence: float) -> tuple[float, float]:
    """Ends of the central part of resampled statistics, float [R]."""
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=statistics.dtype)
    low, high = statistics.quantile(ends).tolist()
    return low, high
