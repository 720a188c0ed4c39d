"""How often, how strongly and when features are active: counts over a stream of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dlmctl.sae.features.active import Active

ALIVE = 15
"""A feature with more activations than this is alive, as in the published study."""
LEVELS = 10
"""Bins of the level t."""
PER_OCTAVE = 4
"""Bins of the histogram for each doubling of the activation, from 2^-20 to 2^20."""
OCTAVES = 20
BINS = 2 * OCTAVES * PER_OCTAVE


class Activity:
    """Counts of S features."""

    def __init__(self, slots: int, t_min: float = 0.0, t_max: float = 1.0) -> None:
        self.range = (t_min, t_max)
        self.tokens = 0
        """Tokens looked at."""
        self.documents = 0
        self.count = torch.zeros(slots, dtype=torch.int64)
        """[S], tokens on which a feature is active."""
        self.total = torch.zeros(slots, dtype=torch.float64)
        """[S], sum of its activations."""
        self.largest = torch.zeros(slots)
        """[S]."""
        self.histogram = torch.zeros(slots, BINS, dtype=torch.int64)
        self.level_tokens = torch.zeros(LEVELS, dtype=torch.int64)
        self.level_count = torch.zeros(slots, LEVELS, dtype=torch.int64)
        self.level_total = torch.zeros(slots, LEVELS, dtype=torch.float64)

    @property
    def alive(self) -> Tensor:
        """bool [S]."""
        return self.count > ALIVE

    def add(self, active: Active) -> None:
        """Count a batch."""
        slot, value, slots = active.slot, active.value, len(self.count)
        self.tokens += len(active.row)
        self.documents += len(active.numbers)
        self.count += slot.bincount(minlength=slots)
        self.total += slot.bincount(value.double(), minlength=slots)
        self.largest.scatter_reduce_(0, slot, value, "amax")
        place = slot * BINS + histogram_bin(value)
        self.histogram += place.bincount(minlength=slots * BINS).view(slots, BINS)
        level = self._level_bin(active.batch.level)[active.row]
        self.level_tokens += level.bincount(minlength=LEVELS)
        place, size = slot * LEVELS + level[active.token], slots * LEVELS
        self.level_count += place.bincount(minlength=size).view(slots, LEVELS)
        self.level_total += place.bincount(value.double(), minlength=size).view(slots, LEVELS)

    def _level_bin(self, level: Tensor) -> Tensor:
        low, high = self.range
        share = (level - low) / max(high - low, 1e-12)
        return (share * LEVELS).floor().long().clamp(0, LEVELS - 1)

    def level_edges(self) -> list[float]:
        """The LEVELS + 1 edges of the bins of t."""
        low, high = self.range
        return [low + (high - low) * i / LEVELS for i in range(LEVELS + 1)]


def histogram_bin(value: Tensor) -> Tensor:
    """Bin of each activation; those beyond the ends are in the bins there."""
    place = (value.double().log2() * PER_OCTAVE).floor().long() + BINS // 2
    return place.clamp(0, BINS - 1)


def histogram_edges(first: int, last: int) -> list[float]:
    """Edges of the bins from `first` to `last`."""
    return [2.0 ** ((i - BINS // 2) / PER_OCTAVE) for i in range(first, last + 2)]
