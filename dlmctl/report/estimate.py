"""Statistics of sentences with standard errors over documents.

A statistic T of S things is linearized: T changes by about `influence[i]` for each further copy of
thing i. Things of one document are not independent, so their influences are summed first:

    se^2 = D / (D - 1) * sum over documents (sum of the document's influences)^2

For a share or a ratio this is the estimator of survey sampling (Cochran, Sampling Techniques), for
an AUROC that of Obuchowski (1997, Biometrics 53, 567) for clustered data, up to the factor. The
influences of a difference are the differences of the influences, so a comparison on the same
documents is paired.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dlmctl.report.auroc import auroc, average_ranks


@dataclass(frozen=True)
class Estimate:
    """A statistic and its linearization."""

    value: float
    influence: Tensor
    """float64 [S], with sum 0."""

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.influence - other.influence)

    def over(self, other: Estimate) -> Estimate:
        """The ratio to another statistic that is not 0."""
        ratio = self.value / other.value
        return Estimate(ratio, (self.influence - ratio * other.influence) / other.value)

    def error(self, document: Tensor) -> float | None:
        """Its standard error; None if there is one document alone.

        Args:
            document: int64 [S], the number of the document of each thing.
        """
        distinct, place = document.unique(return_inverse=True)
        if len(distinct) < 2:
            return None
        sums = self.influence.new_zeros(len(distinct)).index_add_(0, place, self.influence)
        return math.sqrt(float(sums.square().sum()) * len(distinct) / (len(distinct) - 1))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of statistics of the same things."""
    value = sum(estimate.value for estimate in estimates) / len(estimates)
    return Estimate(value, torch.stack([e.influence for e in estimates]).mean(dim=0))


def stratified_mean(values: Tensor, stratum: Tensor) -> Estimate:
    """The mean over strata of the mean of values in a stratum, all strata counting the same.

    Args:
        values: [S], numbers or truth values.
        stratum: int64 [S].
    """
    _, place, sizes = stratum.unique(return_inverse=True, return_counts=True)
    numbers = values.double()
    means = numbers.new_zeros(len(sizes)).index_add_(0, place, numbers) / sizes
    influence = (numbers - means[place]) / (sizes[place] * len(sizes))
    return Estimate(float(means.mean()), influence)


def auroc_estimate(scores: Tensor, present: Tensor) -> Estimate:
    """How well scores [S] predict labels, bool [S], of which some are true and some are not."""
    ranks, influence = average_ranks(scores[None])[0], torch.zeros(len(scores), dtype=torch.float64)
    influence = influence.to(ranks)
    value = float(auroc(scores[None], present[None]))
    for label in (True, False):
        of_label, others = present == label, int((present != label).sum())
        # The share of the other label that is below each of these; a tie counts one half.
        below = (ranks[of_label] - average_ranks(scores[of_label][None])[0]) / others
        share = below if label else 1 - below
        influence[of_label] = (share - value) / of_label.sum()
    return Estimate(value, influence)
