"""How often, how strongly and at which noise levels features are active."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dlmctl.sae.features.code_batch import CodeBatch

ALIVE = 15
"""A feature with more activations than this is alive, as in the published study."""
LEVELS = 10
"""Bins of the level t."""
PER_OCTAVE = 4
"""Bins of the histogram for each doubling of the activation, from 2^-20 to 2^20."""
BINS = 2 * 20 * PER_OCTAVE


class FiringStats:
    """Counts of S features."""

    def __init__(self, slots: int, t_min: float = 0.0, t_max: float = 1.0) -> None:
        self.t_min, self.t_max = t_min, t_max
        self.tokens = 0
        self.documents = 0
        self.count = torch.zeros(slots, dtype=torch.int64)
        """[S], tokens on which a feature is active."""
        self.total = torch.zeros(slots, dtype=torch.float64)
        """[S], sum of its activations."""
        self.largest = torch.zeros(slots)
        """[S], its largest activation."""
        self.histogram = torch.zeros(slots, BINS, dtype=torch.int64)
        self.level_tokens = torch.zeros(LEVELS, dtype=torch.int64)
        self.level_count = torch.zeros(slots, LEVELS, dtype=torch.int64)
        self.level_total = torch.zeros(slots, LEVELS, dtype=torch.float64)

    @property
    def alive(self) -> Tensor:
        """bool [S]."""
        return self.count > ALIVE

    def add(self, codes: CodeBatch) -> None:
        """Count a batch."""
        slot, value = codes.slot, codes.value  # [P], [P]
        # In place: a batch fills few of the S x BINS cells. Sums of one batch are made apart, so
        # that they round as sums of few numbers do.
        one, total = torch.ones_like(slot), value.double()
        self.tokens += len(codes.row)
        self.documents += len(codes.numbers)
        self.count.index_add_(0, slot, one)
        self.total += slot.bincount(total, minlength=len(self.count))
        self.largest.scatter_reduce_(0, slot, value, "amax")
        self.histogram.view(-1).index_add_(0, slot * BINS + _histogram_bin(value), one)
        share = (codes.batch.level - self.t_min) / max(self.t_max - self.t_min, 1e-12)  # [B]
        level = (share * LEVELS).floor().long().clamp(0, LEVELS - 1)[codes.row]  # [N]
        self.level_tokens += level.bincount(minlength=LEVELS)
        cell, places = (slot * LEVELS + level[codes.token]).unique(return_inverse=True)
        self.level_count.view(-1).index_add_(0, cell, places.bincount(minlength=len(cell)))
        sums = self.total.new_zeros(len(cell)).index_add_(0, places, total)
        self.level_total.view(-1).index_add_(0, cell, sums)

    def measures(self, slot: int) -> dict[str, Any]:
        """Fields of a feature's record."""
        count, total = int(self.count[slot]), float(self.total[slot])
        histogram: dict[str, list[float]] = {"edges": [], "counts": []}
        if count:
            filled = self.histogram[slot].nonzero().squeeze(1).tolist()
            bins = range(filled[0], filled[-1] + 2)
            histogram["edges"] = [rounded(2.0 ** ((i - BINS // 2) / PER_OCTAVE)) for i in bins]
            histogram["counts"] = self.histogram[slot, filled[0] : filled[-1] + 1].tolist()
        return {
            "active": count,
            "firing_rate": rounded(count / max(1, self.tokens)),
            "mean": rounded(total / count) if count else None,
            "max": rounded(float(self.largest[slot])),
            "histogram": histogram,
        }

    def time_profile(self, slot: int) -> dict[str, Any]:
        """Firing rate and mean activation over the bins of t; None for a bin without tokens."""
        tokens, span = self.level_tokens.tolist(), self.t_max - self.t_min
        counts, totals = self.level_count[slot].tolist(), self.level_total[slot].tolist()
        return {
            "edges": [rounded(self.t_min + span * i / LEVELS) for i in range(LEVELS + 1)],
            "tokens": tokens,
            "firing_rate": [
                rounded(c / n) if n else None for c, n in zip(counts, tokens, strict=True)
            ],
            "mean": [rounded(s / c) if c else None for s, c in zip(totals, counts, strict=True)],
        }


def rounded(value: float) -> float:
    """Five significant digits."""
    return float(f"{value:.5g}")


def _histogram_bin(value: Tensor) -> Tensor:
    """Bin of each activation; values beyond either end fall into the bin at that end."""
    bins = (value.double().log2() * PER_OCTAVE).floor().long() + BINS // 2
    return bins.clamp(0, BINS - 1)
