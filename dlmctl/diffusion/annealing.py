"""Attention annealing: a model that read from left to right learns to see the rest bit by bit.

    position q attends to position k    if k <= q, or with probability (s + 1) / S at step s

of all that its pattern lets it see, until from step S - 1 on that is everything (DiffuLLaMA, arXiv
2410.17891, section 3.2). Which pairs are open depends on the seed, the step and the two positions
alone: it is the same for all texts of a step, whatever the batch size, and in a resumed run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dlmctl.diffusion.noise import stream_key, uniform
from dlmctl.models.attention import Narrowing
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

FARTHEST = 2**31
"""More positions than a text has."""


def open_share(step: int, steps: int) -> float:
    """The share of later positions that are seen at a step, counted from 0."""
    return min(1.0, (step + 1) / steps)


def opened(share: float, seed: int, step: int) -> Narrowing | None:
    """What of its attention a model has when this share is open; None: all of it."""
    if share >= 1:
        return None
    key = stream_key("attention", seed, step)

    def attended(positions: Tensor) -> Tensor:
        queries, keys = positions[:, :, None], positions[:, None]
        draws = uniform(torch.tensor(key, device=positions.device), queries * FARTHEST + keys)
        return (keys <= queries) | (draws < share)

    return attended


def check_annealed(policy: Policy) -> None:
    """Raise UsageError if a model has no attention that could be opened."""
    if not policy.diffusion or policy.model_family.pattern is None or policy.vision is not None:
        raise UsageError(
            "--anneal-attention is for diffusion models that are decoders, as 'dlmctl init --from' "
            f"makes them; {policy.name} is of family {policy.family}"
        )
