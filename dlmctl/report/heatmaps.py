"""Heat maps of measures that are lists: a row per label of a line, a column per place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from dlmctl.records.errors import DataError

Grid = dict[str, list[float]]
"""Label of a row to its numbers, with nan for a missing one."""


def is_curve(value: Any) -> bool:
    """Whether a value is a list of numbers, some of which may be null."""
    return (
        isinstance(value, list)
        and any(isinstance(entry, (int, float)) for entry in value)
        and all(entry is None or isinstance(entry, (int, float)) for entry in value)
    )


def mean_rows(name: str, curves: Mapping[str, Sequence[Sequence[float | None]]]) -> Grid:
    """The mean of each row's lists, place by place, without nulls.

    Raises:
        DataError: the lists differ in length.
    """
    lengths = {len(curve) for lists in curves.values() for curve in lists}
    if len(lengths) > 1:
        raise DataError(
            f"'{name}' is a list of {min(lengths)} numbers in one record and of {max(lengths)} in "
            "another; a heat map takes one length"
        )
    return {
        label: [_mean(place) for place in zip(*lists, strict=True)]
        for label, lists in curves.items()
    }


def heat_panel(figure: Any, axis: Any, name: str, grid: Grid) -> None:
    """Draw a grid, and the scale of its numbers next to it."""
    picture = axis.imshow(
        list(grid.values()), aspect="auto", cmap="viridis", interpolation="nearest"
    )
    axis.set_title(name, fontsize=10, loc="left")
    axis.set_yticks(range(len(grid)), list(grid), fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)
    figure.colorbar(picture, ax=axis).ax.tick_params(labelsize=8)


def _mean(place: Sequence[float | None]) -> float:
    numbers = [value for value in place if value is not None]
    return fmean(numbers) if numbers else math.nan
