"""`dlmctl doctor`: options and wiring."""

from __future__ import annotations

import sys
from typing import Annotated

from dlmctl.records.errors import UnavailableError
from dlmctl.records.jsonl import write_records
from dlmctl.settings import Knob


def command(
    as_json: Annotated[
        bool | None,
        Knob(
            "JSON lines or a table.",
            "--json/--table",
            shown_default="table on a terminal, else json",
        ),
    ] = None,
) -> None:
    """Say what this machine has and what is missing.

    Reports torch, CUDA devices and their memory, optional packages and the command that installs
    each. Exits with 69 if something that every stage needs is missing.

    Examples:

    dlmctl doctor

    dlmctl doctor --json | jq -r 'select(.state == "missing") | .detail'
    """
    from dlmctl.report.diagnosis import findings

    rows = findings()
    if as_json or (as_json is None and not sys.stdout.isatty()):
        write_records([row._asdict() for row in rows])
    else:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        colours = {"ok": "green", "missing": "yellow", "broken": "red"}
        for name, state, detail in rows:
            # As text: [eval] of a command is no markup.
            table.add_row(name, Text(state, colours[state]), Text(detail))
        Console().print(table)
    if broken := [row.name for row in rows if row.state == "broken"]:
        raise UnavailableError(f"this cannot work yet: {', '.join(broken)}")
