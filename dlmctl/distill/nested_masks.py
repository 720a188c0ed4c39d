"""Nested masks: a completion with more tokens masked at level t than at level s < t.

Every token has a number u_i and is masked at level t if u_i < t, so that what is masked at s is
masked at t as well. With the L tokens ranked by these numbers, the first k are masked at level
k / L, which leaves out the levels at which nothing is masked:

    k ~ U{1..L},   k' = max(k - m, 0),   M_s = the first k',   M_t = the first k

The step from t to s decides m tokens, as does a step of a sampler that takes L / m of them. The
numbers are random (as in the papers on masked consistency), or fall with the step at which a
sampler decided the token, so that M_t is a state that the sampler was in (the order of its
trajectory, as in d3LLM, arXiv 2601.07568).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import stream_uniform
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, object_field
from dlmctl.settings.distill import Order


class NestedMasks(NamedTuple):
    """The masks of one completion at two levels."""

    at_t: Tensor
    """bool [G], M_t."""
    at_s: Tensor
    """bool [G], M_s, a subset of M_t."""

    @property
    def decided(self) -> Tensor:
        """bool [G], masked at t but not at s."""
        return self.at_t & ~self.at_s


class NestedExample(NamedTuple):
    """A prompt, and a completion with its masks at two levels."""

    prompt: Sequence[int]
    completion: Sequence[int]
    masks: NestedMasks


def nested_masks(scored: Tensor, ranks: Tensor, masked: int, decided: int) -> NestedMasks:
    """M_t with `masked` tokens and M_s with `decided` fewer, but at least 0.

    Args:
        scored: bool [G], the tokens that count, L of them.
        ranks: int64 [L], a permutation; the tokens of lowest rank stay masked longest.
    """
    levels = []
    for count in (masked, max(masked - decided, 0)):
        level = torch.zeros_like(scored)
        level[scored] = ranks < count
        levels.append(level)
    return NestedMasks(*levels)


def draw_nested(
    record: Record, scored: Tensor, order: Order, decided: int, keys: Sequence[str | int]
) -> NestedMasks:
    """The masks of a record's completion at two levels, a function of the keys.

    Args:
        scored: bool [G], the tokens that count.
        decided: m, tokens that a step decides.

    Raises:
        DataError: `order` is "trajectory", and the record does not say in which order its tokens
            were decided.
    """
    length = int(scored.sum())
    numbers = stream_uniform(keys, length + 1)
    masked = 1 + int(numbers[0] * length)
    late = numbers[1:]
    if order == "trajectory":
        # The latest step first; the order within a step is random.
        late = late - _steps(record, len(scored))[scored]
    return nested_masks(scored, late.argsort().argsort(), masked, decided)


def _steps(record: Record, length: int) -> Tensor:
    """The step at which each token was decided, float64 [G]."""
    order = object_field(record, "rollout").get("order")
    if (
        not isinstance(order, list)
        or len(order) != length
        or not all(isinstance(step, int) for step in order)
    ):
        raise DataError(
            "the record does not say in which order its tokens were decided ('rollout.order'): "
            "take completions of 'dlmctl rollout', or --order random",
            record.where,
        )
    return torch.tensor(order, dtype=torch.float64)
