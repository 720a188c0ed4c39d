"""Area under the ROC curve, by ranks.

    AUROC = (R - n1 (n1 + 1) / 2) / (n1 n0)

with R the sum of the ranks of the n1 positives among all. It is the share of pairs of a positive
and a negative that the score has in the right order. Equal scores have the mean of their ranks, so
that such a pair counts one half.
"""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(scores: Tensor, present: Tensor) -> Tensor:
    """How well each of F scores predicts each of V labels, over S things.

    Args:
        scores: float [F, S].
        present: bool [V, S]; every row has a true and a false.

    Returns:
        float64 [F, V].
    """
    labels = present.double()
    positives = labels.sum(dim=1)  # [V]
    negatives = present.shape[1] - positives
    sums = average_ranks(scores) @ labels.T  # [F, V]
    return (sums - positives * (positives + 1) / 2) / (positives * negatives)


def stratified_auroc(score: Tensor, right: Tensor, stratum: Tensor | None = None) -> float | None:
    """AUROC over the pairs within a stratum; None if no stratum has both a right and a wrong one.

    Args:
        score: float [N].
        right: bool [N].
        stratum: int64 [N]; None is one stratum.
    """
    if not len(score):
        return None
    if stratum is None:
        stratum = torch.zeros(len(score), dtype=torch.int64)
    wins, pairs = stratified_wins(score, right, stratum)
    return float(wins.sum() / pairs.sum()) if pairs.any() else None


def stratified_wins(score: Tensor, right: Tensor, stratum: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs of a right and a wrong one within each of S strata, in their order.

    Args:
        score, right, stratum: as `stratified_auroc` takes them.

    Returns:
        How many have the right order, a tie counting one half, and how many there are; float64 [S].
    """
    value, stratum = (column.unique(return_inverse=True)[1] for column in (score, stratum))
    # Ranks among all by stratum, then score; those of a stratum begin behind the ones before.
    ranks = average_ranks((stratum * (value.max() + 1) + value)[None])[0]  # [N]
    sizes, positives = torch.bincount(stratum), torch.bincount(stratum, right.double())
    before = sizes.cumsum(0) - sizes
    sums = torch.bincount(stratum, ranks.where(right, 0.0))
    wins = sums - positives * (before + (positives + 1) / 2)
    return wins, positives * (sizes - positives)


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
