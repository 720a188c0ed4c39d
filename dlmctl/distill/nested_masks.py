"""Nested masks: the same completion hidden more at level t than at level s < t.

Every token has a number u_i, and is hidden at level t where u_i < t; so that what is hidden at s is
hidden at t as well. With the tokens ranked by these numbers the k first of L are hidden at level
k / L, which leaves out the levels at which nothing is hidden:

    k ~ U{1..L},   k' = max(k - m, 0),   M_s = the k' first,   M_t = the k first

m tokens are decided in a step from t to s, which is a step of a sampler with L / m of them. The
numbers are random (method of the masked consistency papers), or fall with the step at which a
sampler decided the token, so that M_t is a state that the sampler was in (the order of its
trajectory, as in d3LLM, arXiv 2601.07568).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import stream_uniform
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, object_field

Order = Literal["random", "trajectory"]


class Nested(NamedTuple):
    """Two levels of one completion."""

    hidden: Tensor
    """bool [G], M_t."""
    still: Tensor
    """bool [G], M_s, a subset of it."""

    @property
    def decided(self) -> Tensor:
        """bool [G], hidden at t and no more at s."""
        return self.hidden & ~self.still


def nested_masks(scored: Tensor, ranks: Tensor, hidden: int, decided: int) -> Nested:
    """M_t with `hidden` tokens and M_s with `decided` fewer, at least none.

    Args:
        scored: bool [G], the tokens that count; L of them.
        ranks: int64 [L], a permutation; those with the lowest are hidden longest.
    """
    levels = []
    for count in (hidden, max(hidden - decided, 0)):
        level = torch.zeros_like(scored)
        level[scored] = ranks < count
        levels.append(level)
    return Nested(*levels)


def draw_nested(
    record: Record,
    scored: Tensor,
    order: Order,
    decided: int,
    keys: Sequence[str | int],
) -> Nested:
    """Two levels of a record's completion, drawn by these keys alone.

    Args:
        scored: bool [G], the tokens that count.
        decided: m, tokens that a step decides.

    Raises:
        DataError: `trajectory` of a record that does not say in which order it was decided.
    """
    length = int(scored.sum())
    numbers = stream_uniform(keys, length + 1)
    hidden = 1 + int(numbers[0] * length)
    late = numbers[1:]
    if order == "trajectory":
        # The latest step first; tokens of one step by chance.
        late = late - _steps(record, len(scored))[scored]
    return nested_masks(scored, late.argsort().argsort(), hidden, decided)


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
