"""`dlmctl doctor`: options and wiring."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dlmctl.records.errors import UnavailableError
from dlmctl.records.jsonl import write_records


def command(
    as_json: Annotated[
        bool | None,
        typer.Option(
            "--json/--table",
            show_default="table on a terminal, else json",
            help="JSON lines or a table.",
        ),
    ] = None,
) -> None:
    """Say what this machine has and what is missing.

    Reports torch, CUDA devices and their memory, optional packages and the command that installs
    each. Exit 69 if something that every stage needs is missing.

    Examples:

    dlmctl doctor

    dlmctl doctor --json | jq -r 'select(.state == "missing") | .detail'
    """
    from dlmctl.report.diagnosis import findings

    found = findings()
    if as_json or (as_json is None and not sys.stdout.isatty()):
        write_records([finding._asdict() for finding in found])
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        colours = {"ok": "green", "missing": "yellow", "broken": "red"}
        for name, state, detail in found:
            # As text: [eval] of a command is no markup.
            table.add_row(name, Text(state, colours[state]), Text(detail))
        Console().print(table)
    broken = [finding.name for finding in found if finding.state == "broken"]
    if broken:
        raise UnavailableError(f"this cannot work yet: {', '.join(broken)}")
