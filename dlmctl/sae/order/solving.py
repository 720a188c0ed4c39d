"""Do completions whose features change in a certain way solve their puzzle more often?

A completion solves it if it has the tokens of the right one, where those are known. For each
measure of `FeatureChange` reports (s_pre, d_post and the others) the correlation with solving, over
the completions of one order; the error is from a bootstrap over puzzles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dlmctl.report.bootstrap import drawn_counts

RESAMPLES = 1000


def solving_rows(
    columns: Mapping[str, Tensor], measures: tuple[str, ...], seed: int
) -> list[dict[str, Any]]:
    """A row for each measure.

    Args:
        columns: [N] each: `puzzle` int64, `right` bool, and the measures float64, NaN where a
            completion has none.
        seed: of the bootstrap.
    """
    rows = []
    for name in measures:
        known = ~columns[name].isnan()
        value, right = columns[name][known], columns["right"][known].double()
        row: dict[str, Any] = {"measure": name, "completions": len(value)}
        row |= {"solved": float(right.mean()) if len(right) else None}
        row |= _correlation(value, right, columns["puzzle"][known], seed)
        rows.append(row)
    return rows


def _correlation(
    value: Tensor, right: Tensor, puzzle: Tensor, seed: int
) -> dict[str, float | None]:
    """Pearson's, and its error; None if a side does not vary."""
    if len(value) < 2:
        return {"correlation": None, "correlation_se": None}
    puzzles, place = puzzle.unique(return_inverse=True)
    a, b = value - value.mean(), right - right.mean()
    moments = torch.stack([torch.ones_like(a), a, b, a * a, b * b, a * b], dim=1)  # [N, 6]
    sums = moments.new_zeros(len(puzzles), 6).index_add_(0, place, moments)
    once = torch.ones(1, len(puzzles), dtype=torch.float64)
    counts = torch.cat([once, drawn_counts(len(puzzles), RESAMPLES, seed)])
    n, *totals = (counts @ sums).T
    a_mean, b_mean, aa, bb, ab = (total / n for total in totals)
    spread = (aa - a_mean**2).clamp(min=0) * (bb - b_mean**2).clamp(min=0)  # [1 + R]
    r = (ab - a_mean * b_mean) / spread.where(spread > 1e-24, torch.nan).sqrt()
    drawn = r[1:][~r[1:].isnan()]
    known = not bool(r[0].isnan())
    enough = known and len(puzzles) > 1 and len(drawn) > 1
    return {
        "correlation": float(r[0]) if known else None,
        "correlation_se": float(drawn.std()) if enough else None,
    }
