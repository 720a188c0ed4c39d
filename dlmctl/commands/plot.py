"""`dlmctl plot`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.options import Files, OnErrorOption
from dlmctl.records.errors import UsageError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import read_records

DEFAULT_YS = ["reward", "kl", "grad_norm"]


def command(
    files: Files = None,
    output: Annotated[
        str,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Picture, PNG or SVG by its ending; - is PNG on standard output.",
        ),
    ] = "-",
    ys: Annotated[
        list[str] | None,
        typer.Option(
            "-y",
            metavar="MEASURE",
            show_default=", ".join(DEFAULT_YS),
            help="What is drawn, one panel each: a field of the records, rollout.order is one "
            "within a field; repeatable.",
        ),
    ] = None,
    x: Annotated[str, typer.Option("-x", metavar="FIELD", help="What it is drawn over.")] = "step",
    by: Annotated[
        str,
        typer.Option(
            metavar="FIELD", help="A line for each value of this field, or of a list of fields."
        ),
    ] = "run",
    smooth: Annotated[
        int, typer.Option(min=1, help="Mean over so many points, the points faint behind it.")
    ] = 1,
    log_x: Annotated[
        bool,
        typer.Option("--log-x", help="-x on a logarithmic axis; 0 is left out."),
    ] = False,
    log_y: Annotated[
        bool,
        typer.Option("--log-y", help="Measures on logarithmic axes; 0 is left out."),
    ] = False,
    title: Annotated[str, typer.Option(help="Title of the picture.")] = "",
    on_error: OnErrorOption = "fail",
) -> None:
    """Draw curves from metrics records.

    Reads what 'dlmctl update' writes (or any JSONL with numbers) and draws a panel for each
    measure. Several values of a line at one place become their mean and a band of the standard
    error. A measure that is a list of numbers becomes a heat map: a row for each value of --by, a
    column for each place of the list, and means where there are several lists.

    Examples:

    dlmctl plot runs/a/metrics.jsonl runs/b/metrics.jsonl -y reward -y kl --smooth 10 -o curves.png

    dlmctl plot eval.jsonl -x k -y fve -y delta_mask --by layer -o sparsity.png

    dlmctl plot ordered.jsonl -y rollout.order --by rollout.remasking -o orders.png
    """
    from dlmctl.report.plots import collect, draw

    if output == "-" and sys.stdout.isatty():
        raise UsageError("a picture cannot go to the terminal: give -o FILE.png")
    kind = "png" if output == "-" else Path(output).suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise UsageError(f"-o {output} ends neither in .png nor in .svg")
    panels = collect(read_records(files or [], on_error), x, ys or DEFAULT_YS, by)
    picture = draw(panels, x, title, smooth, kind, log_x=log_x, log_y=log_y)
    if output == "-":
        sys.stdout.buffer.write(picture)
        sys.stdout.buffer.flush()
    else:
        write_file(Path(output), picture)
