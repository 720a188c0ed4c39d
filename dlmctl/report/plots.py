"""Curves from metrics records: one panel per measure, one line per run.

A measure that is a list of numbers becomes a heat map, with a row in place of a line. If a line has
several values at one place, as several seeds give, it goes through their mean, with a band of the
standard error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import nan, sqrt
from statistics import fmean, stdev
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, nested
from dlmctl.report.figures import dress, new_figure, saved
from dlmctl.settings.report import Curves

Grid = dict[str, list[float]]
"""Label of a row of a heat map to its numbers, with nan for a missing one."""
Series = dict[str, list[tuple[float, float]]]
"""Label of a line: its points, x and y."""

FEW = 8
"""At most this many places on a logarithmic axis are the ticks themselves, not powers of ten."""
COLUMNS = 3
"""Most panels side by side."""
LEGEND = 0.3
"""Inches that a picture has for a legend of one row."""
STYLES = ("-", "--", ":", "-.")
"""Line styles, one for each round through the colours."""
COLOURS = ("#1b6ca8", "#d1495b", "#3c887e", "#edae49", "#66508f", "#7a7a7a")


def collect(records: Iterable[Record], curves: Curves) -> dict[str, tuple[Series, Grid]]:
    """The points of each measure and line, or its lists.

    Records without a measure are skipped; one without x is drawn at its number in the stream.

    Raises:
        DataError: no record has a measure, or it is a number in one record and a list in another.
    """
    x, ys, by = curves.x, curves.measures, curves.by
    points: dict[str, Series] = {y: {} for y in ys}
    lists: dict[str, dict[str, list[list[float | None]]]] = {y: {} for y in ys}
    names: dict[str, None] = {}
    for number, record in enumerate(records):
        names.update(dict.fromkeys(record))
        at = nested(record, x)
        at = number if at is None else at
        for y in ys:
            value = nested(record, y)
            if is_curve(value):
                lists[y].setdefault(_label(record, by), []).append(value)
            elif isinstance(value, (int, float)) and isinstance(at, (int, float)):
                points[y].setdefault(_label(record, by), []).append((at, value))
    for y in ys:
        if not points[y] and not lists[y]:
            others = ", ".join(names) or "no records"
            raise DataError(f"no record has a number '{y}' over '{x}'; there are: {others}")
        if points[y] and lists[y]:
            raise DataError(f"'{y}' is a number in one record and a list in another")
    return {y: (points[y], mean_rows(y, lists[y])) for y in ys}


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


def _mean(place: Sequence[float | None]) -> float:
    numbers = [value for value in place if value is not None]
    return fmean(numbers) if numbers else nan


def averaged(points: Iterable[tuple[float, float]]) -> list[tuple[float, float, float]]:
    """For each x in order, the mean of y and its standard error (0 for a single value)."""
    values_at: dict[float, list[float]] = {}
    for at, value in points:
        values_at.setdefault(at, []).append(value)
    return [
        (at, fmean(values), stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0)
        for at, values in sorted(values_at.items())
    ]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, or over fewer at the beginning."""
    return [
        sum(part) / len(part)
        for end in range(1, len(values) + 1)
        for part in [values[max(0, end - window) : end]]
    ]


def draw(panels: dict[str, tuple[Series, Grid]], curves: Curves, kind: str) -> bytes:
    """A picture, `kind` png or svg.

    Raises:
        UnavailableError: matplotlib is not installed.
    """
    wide = min(COLUMNS, len(panels))
    high = -(-len(panels) // wide)
    figure = new_figure(4.2 * wide, 2.9 * high + LEGEND, "plot")
    axes = figure.subplots(high, wide, squeeze=False).flatten()
    with_lines = []
    for axis, (name, (series, grid)) in zip(axes, panels.items(), strict=False):
        if grid:
            _heat_panel(figure, axis, name, grid)
        else:
            _panel(axis, name, series, curves)
            with_lines.append(axis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    lines = {label: line for axis in with_lines for line, label in _labelled(axis)}
    if len(lines) > 1:
        _legend(figure, lines)
    if curves.title:
        figure.suptitle(curves.title, fontsize=11)
    return saved(figure, kind)


def _labelled(axis: Any) -> Iterable[tuple[Any, str]]:
    return zip(*axis.get_legend_handles_labels(), strict=True)


def _legend(figure: Any, lines: Mapping[str, Any]) -> None:
    """The names of the lines below the panels, in as many columns as the picture has room for."""
    for columns in range(min(4, len(lines)), 0, -1):
        legend = figure.legend(
            list(lines.values()),
            list(lines),
            loc="outside lower center",
            ncols=columns,
            frameon=False,
        )
        size = legend.get_window_extent()
        if columns == 1 or size.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + max(0.0, size.height / figure.dpi - LEGEND))


def _label(record: Record, by: str) -> str:
    values = (nested(record, name) for name in by.split(","))
    return " ".join("" if value is None else str(value) for value in values)


def _panel(axis: Any, name: str, series: Series, curves: Curves) -> None:
    for number, (label, points) in enumerate(series.items()):
        at, values, errors = map(list, zip(*averaged(points), strict=True))
        again, which = divmod(number, len(COLOURS))
        colour, style = COLOURS[which], STYLES[again % len(STYLES)]
        if curves.smooth > 1:
            axis.plot(at, values, color=colour, alpha=0.25, linewidth=0.8)
        if any(errors):
            low = [v - e for v, e in zip(values, errors, strict=True)]
            high = [v + e for v, e in zip(values, errors, strict=True)]
            axis.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        marker = "o" if len(at) < 12 else None
        line = smoothed(values, curves.smooth)
        axis.plot(
            at, line, style, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label
        )
    if curves.log_y:
        axis.set_yscale("log", nonpositive="mask")
    if curves.log_x:
        axis.set_xscale("log", nonpositive="mask")
        places = sorted({at for points in series.values() for at, _ in points if at > 0})
        if len(places) <= FEW:
            axis.set_xticks(places, [f"{place:g}" for place in places])
            axis.set_xticks([], minor=True)
    elif all(float(at).is_integer() for points in series.values() for at, _ in points):
        axis.xaxis.get_major_locator().set_params(integer=True)
    dress(axis, name, curves.x)


def _heat_panel(figure: Any, axis: Any, name: str, grid: Grid) -> None:
    """Draw a grid, and the scale of its numbers next to it."""
    picture = axis.imshow(
        list(grid.values()), aspect="auto", cmap="viridis", interpolation="nearest"
    )
    axis.set_title(name, fontsize=10, loc="left")
    axis.set_yticks(range(len(grid)), list(grid), fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)
    figure.colorbar(picture, ax=axis).ax.tick_params(labelsize=8)
