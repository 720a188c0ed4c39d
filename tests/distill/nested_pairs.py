"""Completions with masks at two levels, and the gradient of a small model, for tests."""

from __future__ import annotations

import torch

from dlmctl.distill.nested_masks import NestedExample, NestedMasks
from dlmctl.models.policy import Policy

PROMPT = [4, 5, 8]


def gradient(policy: Policy) -> torch.Tensor:
    """Of all weights, which have none afterwards."""
    parts = [
        (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        for p in policy.model.parameters()
    ]
    policy.model.zero_grad()
    return torch.cat(parts)


def pair(hidden: list[int], still: list[int], completion: list[int]) -> NestedExample:
    """A completion with these places masked at t, and those at s."""

    def at(places: list[int]) -> torch.Tensor:
        mask = torch.zeros(len(completion), dtype=torch.bool)
        mask[places] = True
        return mask

    return NestedExample(PROMPT, completion, NestedMasks(at(hidden), at(still)))
