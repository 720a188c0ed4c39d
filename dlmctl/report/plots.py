"""Curves from metrics records: one panel for each measure, one line for each run.

A measure that is a list of numbers becomes a heat map, with a row where others have a line.

Where a line has several values at one place, as runs with several seeds do, it goes through their
means, with the standard error as a band.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import Any

from dlmctl.records.errors import DataError, missing_package
from dlmctl.records.jsonl import Record, nested
from dlmctl.report.heatmaps import Grid, heat_panel, is_curve, mean_rows

Series = dict[str, list[tuple[float, float]]]
"""Label of a line: its points, x and y."""

COLOURS = ("#1b6ca8", "#d1495b", "#3c887e", "#edae49", "#66508f", "#7a7a7a")


def collect(
    records: Iterable[Record], x: str, ys: Sequence[str], by: str
) -> dict[str, tuple[Series, Grid]]:
    """The points of every measure and line, and its lists; what lacks x or y is passed over.

    A name with dots is that of a field within fields, as `rollout.order`.

    Raises:
        DataError: no record has a measure at all, or one is a number here and a list there.
    """
    points: dict[str, Series] = {y: {} for y in ys}
    curves: dict[str, dict[str, list[list[float | None]]]] = {y: {} for y in ys}
    names: dict[str, None] = {}
    for number, record in enumerate(records):
        names.update(dict.fromkeys(record))
        at = nested(record, x)
        at = number if at is None else at
        for y in ys:
            value = nested(record, y)
            if is_curve(value):
                curves[y].setdefault(_label(record, by), []).append(value)
            elif isinstance(value, (int, float)) and isinstance(at, (int, float)):
                points[y].setdefault(_label(record, by), []).append((at, value))
    for y in ys:
        if not points[y] and not curves[y]:
            there = ", ".join(names) or "no records"
            raise DataError(f"no record has a number '{y}' over '{x}'; there are: {there}")
        if points[y] and curves[y]:
            raise DataError(f"'{y}' is a number in one record and a list in another")
    return {y: (points[y], mean_rows(y, curves[y])) for y in ys}


def averaged(points: Iterable[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """For each x in order the mean of y and its standard error, 0 of a single value."""
    found: dict[float, list[float]] = {}
    for at, value in points:
        found.setdefault(at, []).append(value)
    return [
        (at, fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0)
        for at, values in sorted(found.items())
    ]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, or those there are."""
    return [
        sum(part) / len(part)
        for end in range(1, len(values) + 1)
        for part in [values[max(0, end - window) : end]]
    ]


def draw(
    panels: dict[str, tuple[Series, Grid]],
    x: str,
    title: str,
    window: int,
    kind: str,
    columns: int = 3,
    log_x: bool = False,
    log_y: bool = False,
) -> bytes:
    """A picture, PNG or SVG.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise missing_package("matplotlib", "plot", "plot") from None
    wide = min(columns, len(panels))
    high = -(-len(panels) // wide)
    figure = Figure(figsize=(4.2 * wide, 2.9 * high + 0.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    for axis, (name, (series, grid)) in zip(axes, panels.items(), strict=False):
        if grid:
            heat_panel(figure, axis, name, grid)
        else:
            _panel(axis, name, series, x, window, (log_x, log_y))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    lines = [axis for axis, (series, _) in zip(axes, panels.values(), strict=False) if series]
    if lines and len(lines[0].get_lines()) > 1:
        handles, labels = lines[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return picture.getvalue()


def _label(record: Record, by: str) -> str:
    found = (nested(record, name) for name in by.split(","))
    return " ".join("" if value is None else str(value) for value in found)


def _panel(
    axis: Any, name: str, series: Series, x: str, window: int, logarithmic: tuple[bool, bool]
) -> None:
    for number, (label, points) in enumerate(series.items()):
        at, values, errors = map(list, zip(*averaged(points), strict=True))
        colour = COLOURS[number % len(COLOURS)]
        if window > 1:
            axis.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        if any(errors):
            low = [v - e for v, e in zip(values, errors, strict=True)]
            high = [v + e for v, e in zip(values, errors, strict=True)]
            axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        marker = "o" if len(at) < 12 else None
        line = smoothed(values, window)
        axis.plot(at, line, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
    log_x, log_y = logarithmic
    if log_y:
        axis.set_yscale("log", nonpositive="mask")
    if log_x:
        axis.set_xscale("log", nonpositive="mask")
    elif all(float(at).is_integer() for points in series.values() for at, _ in points):
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(name, fontsize=10, loc="left")
    axis.set_xlabel(x, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0.02)
