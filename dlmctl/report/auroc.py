"""Area under the ROC curve of many scores at once, by ranks.

    AUROC = (R - n1 (n1 + 1) / 2) / (n1 n0)

with R the sum of the ranks of the n1 positives among all, which is the share of pairs of a positive
and a negative that the score has in the right order; equal scores have the mean of their ranks, so
that such a pair counts one half.
"""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(scores: Tensor, present: Tensor) -> Tensor:
    """How well each score tells each label.

    Args:
        scores: float [F, S], F scores of S things.
        present: bool [V, S]; every row has a true and a false.

    Returns:
        float64 [F, V].
    """
    there = present.double()
    positives = there.sum(dim=1)
    negatives = present.shape[1] - positives
    sums = average_ranks(scores) @ there.T
    return (sums - positives * (positives + 1) / 2) / (positives * negatives)


def average_ranks(scores: Tensor) -> Tensor:
    """Ranks from 1 on within each row of [F, S], float64; equal scores share their mean rank."""
    ordered, order = scores.sort(dim=1)
    places = torch.arange(scores.shape[1], device=scores.device).expand(ordered.shape)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    ends = begins.roll(-1, dims=1)  # before the next one begins; the last one always ends
    first = places.where(begins, 0).cummax(dim=1).values
    last = places.where(ends, scores.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    ranks = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
    return ranks.scatter_(1, order, (first + last).double() / 2 + 1)
