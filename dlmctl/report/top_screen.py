"""Runs on one screen of a terminal: what each does, and a panel for each of its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dlmctl.report.page import shown
from dlmctl.report.text_curves import drawn
from dlmctl.report.watched_run import Series, WatchedRun

COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red")
NARROWEST, TALLEST, PLAIN = 34, 8, 4
"""Characters of a panel at least; lines of a curve at most, and where no terminal limits them."""


def screen(runs: Sequence[WatchedRun], width: int, height: int | None, braille: bool) -> Any:
    """What rich prints.

    Args:
        height: of the terminal, in lines; None has no limit.
        braille: whether the terminal has these characters.
    """
    from rich.console import Group

    columns = max(1, width // NARROWEST)
    each = None if height is None else max(5, (height - 1) // max(1, len(runs)))
    return Group(*(part for run in runs for part in _run(run, width, columns, each, braille)))


def _run(run: WatchedRun, width: int, columns: int, height: int | None, braille: bool) -> list[Any]:
    from rich.table import Table
    from rich.text import Text

    head = Text.assemble((shown(str(run.directory)), "bold"), f"  {run.kind}; {run.state()}")
    if head.cell_len > width:
        head = Text.assemble((shown(run.directory.name), "bold"), f"  {run.kind}; {run.state()}")
    lines: list[Any] = [head, Text(run.place())]
    legend = _legend(run)
    if legend:
        lines.append(legend)
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    panels, tall = list(run.series.items()), PLAIN
    if height is not None:
        free = height - len(lines)
        rows = max(1, min(-(-len(panels) // columns), free // 3))  # a title and two lines each
        panels = panels[: rows * columns]
        tall = max(1, min(TALLEST, free // rows - 1))
    columns = max(1, min(columns, len(panels)))
    wide = (width - 2 * (columns - 1)) // columns
    grid = Table.grid(padding=(0, 2, 0, 0))
    for first in range(0, len(panels), columns):
        row = panels[first : first + columns]
        grid.add_row(*(_panel(name, series, wide, tall, braille) for name, series in row))
    return [*lines, grid]


def _legend(run: WatchedRun) -> Any:
    from rich.text import Text

    names = list(dict.fromkeys(name for series in run.series.values() for name in series if name))
    if not names:
        return None
    parts = [(f"{shown(name)}  ", COLOURS[n % len(COLOURS)]) for n, name in enumerate(names)]
    return Text.assemble(*parts)


def _panel(name: str, series: Series, width: int, height: int, braille: bool) -> Any:
    """The name of a curve with its last value, and the curve between its bounds."""
    from rich.text import Text

    values = [y for points in series.values() for _, y in points]
    bounds = [f"{max(values):.4g}", f"{min(values):.4g}"]
    margin = max(map(len, bounds)) + 1
    lines = drawn(list(series.values()), max(4, width - margin), height, braille)
    last = ", ".join(f"{points[-1][1]:.4g}" for points in series.values() if points)
    title = Text.assemble((shown(name), "bold"), f" {last}")
    title.truncate(width, overflow="ellipsis")
    panel = Text("\n").join([title, *(_coloured(line) for line in lines)])
    rows = panel.split("\n")
    rows[1].append(f" {bounds[0]}", "dim")
    if height > 1 and bounds[1] != bounds[0]:
        rows[-1].append(f" {bounds[1]}", "dim")
    return Text("\n").join(rows)


def _coloured(line: Sequence[tuple[str, int]]) -> Any:
    from rich.text import Text

    text = Text()
    for character, number in line:
        text.append(character, COLOURS[number % len(COLOURS)] if number >= 0 else "")
    return text
