"""Sets of images of which it is known how good they are, for measures to be judged by."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_control(train: Tensor, count: int, seed: int) -> Tensor:
    """Draws from a normal distribution with the mean and covariance of the training set's pixels.

    Its moments are right, and its images are not: a Fréchet distance in pixels or their principal
    components cannot tell. With X the centred training set [n, D] a draw is mean + g X / sqrt(n -
    1), g a standard normal [n], so that no D x D covariance is needed.

    Args:
        train: float32 [n, ...].
        count: draws.

    Returns:
        float32 [count, ...]; not clamped, which would change the moments.
    """
    rows = train.flatten(1).double().cpu()
    mean = rows.mean(0)
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(count, len(rows), generator=generator, dtype=torch.float64)
    drawn = mean + weights @ (rows - mean) / max(1, len(rows) - 1) ** 0.5
    return drawn.float().reshape(count, *train.shape[1:])
