"""Rows of results as a table on a terminal."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dlmctl.records.jsonl import write_records
from dlmctl.records.stderr import aside

GAP = 2
"""Spaces between two columns."""
LONG = 40
"""Characters beyond which a cell is text that may need several lines."""


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    cell: Callable[[Mapping[str, Any], str], str] | None = None,
) -> None:
    """Print rows to standard output.

    A table that is wider than the terminal becomes several, one below the other, each with the
    columns that distinguish its rows.

    Args:
        columns: key of a row to the heading of its column; the first, and long text, are flush
            left.
        cell: text of a row's value for a key; None gives numbers four digits.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    texts = {
        heading: [(cell or _plain)(row, name) for row in rows] for name, heading in columns.items()
    }
    with aside():
        for number, block in enumerate(_blocks(texts, console.width)):
            table = Table(box=None, header_style="bold", pad_edge=False)
            for heading in block:
                flush = heading == next(iter(texts)) or max(map(len, texts[heading])) > LONG
                table.add_column(heading, justify="left" if flush else "right")
            for row in zip(*(texts[heading] for heading in block), strict=True):
                table.add_row(*map(escape, row))
            if number:
                print()
            console.print(table)


def _blocks(texts: Mapping[str, Sequence[str]], width: int) -> list[list[str]]:
    """The columns of each table, by their headings."""
    wide = {heading: max(map(len, [heading, *cells])) + GAP for heading, cells in texts.items()}
    headings = list(texts)
    if sum(wide.values()) - GAP <= width:
        return [headings]
    first = headings[: _telling(list(texts.values()))]
    room = width + GAP - sum(wide[heading] for heading in first)
    if room < min(max(wide[heading] for heading in headings[len(first) :]), width // 2):
        first = first[:1]
        room = width + GAP - wide[first[0]]
    blocks: list[list[str]] = []
    left = 0
    for heading in headings[len(first) :]:
        if not blocks or wide[heading] > left:
            blocks.append(list(first))
            left = room
        blocks[-1].append(heading)
        left -= wide[heading]
    return blocks


def _telling(columns: Sequence[Sequence[str]]) -> int:
    """How many of the first columns distinguish all rows."""
    rows = list(zip(*columns, strict=True))
    numbers = range(1, len(columns))
    return next((n for n in numbers if len({row[:n] for row in rows}) == len(rows)), 1)


def write_rows(rows: Iterable[dict[str, Any]], columns: Sequence[str], json: bool) -> None:
    """Rows as a table of these columns on a terminal; as JSON lines in a pipe, or if `json`.

    A number has its standard error behind it, if the row has that as `NAME_se`.
    """
    if json or not sys.stdout.isatty():
        write_records(rows)
    else:
        print_table(list(rows), {name: name.replace("_", " ") for name in columns}, with_error)


def with_error(row: Mapping[str, Any], name: str) -> str:
    """A cell: a number, and behind it its standard error if the row has that as `NAME_se`.

    The error has two significant digits, unless they are beyond the sixth decimal.
    """
    value, error = row.get(name), row.get(f"{name}_se")
    if value is None or not error:
        return _plain(row, name)
    places = min(6, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:.{places}f} ± {error:.{places}f}"


def _plain(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
