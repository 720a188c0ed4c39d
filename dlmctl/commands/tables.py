"""Rows of results as a table on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from dlmctl.records.jsonl import write_records
from dlmctl.records.stderr import aside


def print_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    cell: Callable[[Mapping[str, Any], str], str] | None = None,
) -> None:
    """Print rows to standard output.

    Args:
        columns: key of a row to the heading of its column; the first is set flush left.
        cell: text of a row's value by its key; numbers have four digits without it.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, heading in enumerate(columns.values()):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*((cell or _plain)(row, name) for name in columns))
    with aside():
        Console().print(table)


def write_rows(rows: Iterable[dict[str, Any]], columns: Sequence[str], json: bool) -> None:
    """Rows as a table of these columns on a terminal; as JSON lines in a pipe, or where asked."""
    if json or not sys.stdout.isatty():
        write_records(rows)
    else:
        print_table(list(rows), {name: name.replace("_", " ") for name in columns})


def _plain(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
