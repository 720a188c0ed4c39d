"""Group-relative advantages: how much better a completion is than its prompt's others.

    A_i = r_i - mean_g r                                       group mean      (GRPO, d1)
    A_i = (G r_i - sum_g r) / (G - 1)                          leave-one-out   (RLOO, ESPO)
    then, on request, divided by std_g r + eps or by the standard deviation over the batch.

The unbiased standard deviation and eps = 1e-4 are TRL's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Baseline = Literal["mean", "loo", "none"]
Scale = Literal["none", "group", "batch"]

EPSILON = 1e-4


def advantages(
    rewards: Sequence[Sequence[float]], baseline: Baseline = "mean", scale: Scale = "none"
) -> list[list[float]]:
    """Advantages of each group of rewards, in the same shape.

    A group of one has advantage 0, and so has a group with equal rewards.
    """
    centred = [_centre(torch.tensor(group, dtype=torch.float64), baseline) for group in rewards]
    if scale == "batch":
        std = _std(torch.cat(centred)) if centred else 0.0
        return [(group / (std + EPSILON)).tolist() for group in centred]
    if scale == "group":
        return [(group / (_std(group) + EPSILON)).tolist() for group in centred]
    return [group.tolist() for group in centred]


def _centre(group: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    if baseline == "none":
        return group
    if bool((group == group[0]).all()):
        # Exactly zero: rounding of the mean would leave 1e-17 for std to blow up.
        return torch.zeros_like(group)
    centred = group - group.mean()
    return centred * len(group) / (len(group) - 1) if baseline == "loo" else centred


def _std(values: torch.Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
