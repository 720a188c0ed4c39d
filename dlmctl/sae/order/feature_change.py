"""How the features of a position change from one denoising step to the next (DLM-Scope, 5.2).

    sim_t    |A_t and A_{t-1}| / |A_t or A_{t-1}|, A_t the features active in step t
    s_pre    mean of sim_t over the steps in which the position is still masked
    d_post   mean of 1 - sim_t over the steps after it was decided
    jump     1 - sim_t in the step in which the model sees its token first: in neither of these

A step is a pass of the model, before anything is decided in it. No pass sees the tokens that are
decided last, so they have no d_post.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BINS = 10
"""Of the place in the completion, and of the share of it that is decided."""
LAST = 5
"""Steps before a token is decided that s_pre_last5 averages."""


def jaccard(now: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity float64 [...] of sets of features and the number int64 [...] they share.

    Args:
        now, before: int64 [..., K], distinct within a set; -1 stands for nothing. Two empty sets
            have similarity 1.
    """
    both = torch.cat([now, before], dim=-1).sort(dim=-1).values  # [..., 2K]
    shared = ((both[..., 1:] == both[..., :-1]) & (both[..., 1:] >= 0)).sum(dim=-1)
    union = (both >= 0).sum(dim=-1) - shared
    return torch.where(union > 0, shared.double() / union.clamp(min=1), 1.0), shared


class FeatureChange(NamedTuple):
    """From the step before to this one, in completions of R rows of G tokens."""

    similarity: Tensor
    """float64 [R, G]."""
    same_top: Tensor
    """bool [R, G], whether the strongest feature is the same."""
    masked: Tensor
    """bool [R, G], now."""
    was_masked: Tensor
    """bool [R, G], in the step before."""
    known: Tensor
    """bool [R], false in the first step of a row, which has none before it."""


class ChangeStats:
    """Running sums over the steps of completions being sampled, one for each of S slots."""

    def __init__(self, slots: int, length: int, device: torch.device | str = "cpu") -> None:
        names = ("pre", "pre_steps", "lock", "jump", "jumps", "post", "post_steps", "flips")
        curves = ("masked", "masked_count", "decided", "decided_count")

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._sums = {name: zeros(slots, length) for name in names}
        self._recent = zeros(slots, length, LAST).fill_(torch.nan)
        """Similarities of the last steps in which the position was masked."""
        self._curves = {name: zeros(slots, BINS) for name in curves}
        self._bin = torch.arange(length, device=device) * BINS // length  # [G]

    def reset(self, slot: int) -> None:
        """Forget what the slot had before."""
        for sums in (*self._sums.values(), *self._curves.values()):
            sums[slot] = 0
        self._recent[slot] = torch.nan

    def add(self, slots: Tensor, change: FeatureChange) -> None:
        """Add a step of these slots, int64 [R], each at most once."""
        similarity, known = change.similarity, change.known[:, None]
        waiting = change.masked & known  # [R, G]
        arrived = ~change.masked & change.was_masked & known
        settled = ~change.masked & ~change.was_masked & known
        for name, value in {
            "pre": similarity * waiting,
            "pre_steps": waiting,
            "lock": change.same_top & waiting,
            "jump": (1 - similarity) * arrived,
            "jumps": arrived,
            "post": (1 - similarity) * settled,
            "post_steps": settled,
            "flips": ~change.same_top & settled,
        }.items():
            self._sums[name][slots] += value
        recent = self._recent[slots]  # [R, G, LAST]
        later = torch.cat([recent[..., 1:], similarity[..., None]], dim=-1)
        self._recent[slots] = later.where(waiting[..., None], recent)
        part = progress(change.masked, BINS)
        for name, where in (("masked", waiting), ("decided", settled)):
            self._curves[name][slots, part] += (similarity * where).sum(dim=1)
            self._curves[f"{name}_count"][slots, part] += where.sum(dim=1)

    def report(self, slot: int) -> dict[str, float | list[float | None] | None]:
        """The measures of a slot: means over positions of their means over steps."""
        sums = {name: values[slot] for name, values in self._sums.items()}  # [G]
        pre = sums["pre"] / sums["pre_steps"]
        post = sums["post"] / sums["post_steps"]
        flips = sums["flips"].where(sums["post_steps"] > 0, torch.nan)
        curves = {name: values[slot] for name, values in self._curves.items()}  # [BINS]
        return {
            "s_pre": _mean(pre),
            "s_pre_last5": _mean(self._recent[slot].nanmean(dim=1)),
            "lock_ratio": _mean(sums["lock"] / sums["pre_steps"]),
            "jump": _mean(sums["jump"] / sums["jumps"]),
            "d_post": _mean(post),
            "flips_post": _mean(flips),
            "s_pre_by_position": [_mean(pre[self._bin == bin_]) for bin_ in range(BINS)],
            "d_post_by_position": [_mean(post[self._bin == bin_]) for bin_ in range(BINS)],
            "masked_by_progress": _numbers(curves["masked"] / curves["masked_count"]),
            "decided_by_progress": _numbers(curves["decided"] / curves["decided_count"]),
        }


def progress(masked: Tensor, bins: int) -> Tensor:
    """int64 [R]: the bin of the share of each completion that is decided, for bool [R, G]."""
    return ((~masked).sum(dim=1) * bins // masked.shape[1]).clamp(max=bins - 1)


def _mean(values: Tensor) -> float | None:
    """The mean of the values that are not NaN."""
    return _numbers(values.nanmean()[None])[0]


def _numbers(values: Tensor) -> list[float | None]:
    return [None if number != number else number for number in values.tolist()]
