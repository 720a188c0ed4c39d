"""Whether samples are copies of training data: ratio test, similarity of features, duplicates.

A share of copies is taken against a training set and against a held-out set of equal size, which no
sampler can have memorized: what both have in common is likeness, the excess is memorization.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.memorization.images.neighbours import MEMORY, Neighbours, nearest
from dlmctl.records.errors import DataError

THRESHOLD = 1 / 3
_CHUNK = 512
"""References that are compared with each other at once."""


def ratios(neighbours: Neighbours) -> Tensor:
    """float64 [N]: distance to the nearest reference over that to the second nearest, d1 / d2.

    If both are 0, the references contain a copy twice, and the ratio is 1: it cannot tell.
    """
    first, second = neighbours.distances[:, 0], neighbours.distances[:, 1]
    return torch.where(second > 0, first / second, 1.0)


def memorized(neighbours: Neighbours, threshold: float = THRESHOLD) -> Tensor:
    """bool [N]: the ratio test, d1 / d2 below a threshold.

    From Yoon et al. 2023 ("Diffusion probabilistic models generalize when they fail to memorize"),
    with L2 between pixels and 1/3 as in Gu et al. 2023 (arXiv 2310.02664) and Bonnaire et al. 2025
    (arXiv 2505.17638). Duplicates among the references mask copies: see `distinct`.
    """
    return ratios(neighbours) < threshold


def similarities(
    samples: Tensor, references: Tensor, memory: int = MEMORY, device: torch.device | None = None
) -> Tensor:
    """float64 [N]: the largest cosine between a sample's features and a reference's.

    As in Somepalli et al. 2023 (arXiv 2212.03860), where the features are those of SSCD and a copy
    is above 0.5.

    Args:
        samples: float32 [N, F].
        references: float32 [M, F].

    Raises:
        DataError: a row of features is all 0.
    """
    if not all(bool(each.any(1).all()) for each in (samples, references)):
        raise DataError("features that are all 0 have no cosine")
    units = [functional.normalize(each, dim=1) for each in (samples, references)]
    distances = nearest(units[0], units[1], 1, memory, device).distances[:, 0]
    return 1 - distances.square() / 2


def distinct(references: Tensor, tolerance: float = 0.0, memory: int = MEMORY) -> Tensor:
    """int64 [M']: the references without duplicates, in order.

    From the first to the last, a reference is kept unless a kept one equals it or is within the
    tolerance.

    Args:
        references: float32 [M, D].
        tolerance: L2 distance up to which two references are duplicates.
    """
    first: dict[bytes, int] = {}
    for number, row in enumerate(_row_bytes(references)):
        first.setdefault(row, number)
    exact = torch.tensor(list(first.values()))
    if not tolerance:
        return exact
    kept: list[int] = []
    for part in exact.split(_CHUNK):
        new = references[part]  # [C, D]
        free = torch.ones(len(part), dtype=torch.bool)
        if kept:
            free = nearest(new, references[kept], 1, memory).distances[:, 0] > tolerance
        plain = "donot_use_mm_for_euclid_dist"  # by differences, which do not cancel
        near = torch.cdist(new.double(), new.double(), compute_mode=plain).cpu() <= tolerance
        for number in range(len(part)):
            if free[number]:
                free[number + 1 :] &= ~near[number, number + 1 :]
        kept += part[free].tolist()
    return torch.tensor(kept)


def shared(references: Tensor, others: Tensor) -> int:
    """How many of the others equal a reference."""
    known = set(_row_bytes(references))
    return sum(row in known for row in _row_bytes(others))


def _row_bytes(vectors: Tensor) -> list[bytes]:
    rows = (vectors + 0.0).cpu().contiguous().numpy()  # -0.0 becomes 0.0
    return [row.tobytes() for row in rows]
