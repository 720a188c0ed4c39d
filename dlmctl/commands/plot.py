"""`dlmctl plot`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dlmctl.records.errors import UsageError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import read_records
from dlmctl.settings import Knob
from dlmctl.settings.report import Curves
from dlmctl.settings.streams import Files, OnErrorOption


def command(
    files: Files = None,
    output: Annotated[
        str,
        Knob(
            "Picture, PNG or SVG by its ending; - is PNG on standard output.",
            "-o",
            "--output",
            metavar="FILE",
        ),
    ] = "-",
    curves: Curves = Curves(),
    on_error: OnErrorOption = "fail",
) -> None:
    """Draw curves from metrics records.

    Reads what 'dlmctl update' writes (or any JSONL with numbers) and draws a panel for each
    measure. If a line has several values at one place, it goes through their mean, with a band of
    the standard error. A measure that is a list of numbers becomes a heat map: a row for each value
    of --by, a column for each place of the list, and the mean of several lists.

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
    panels = collect(read_records(files or [], on_error), curves)
    picture = draw(panels, curves, kind)
    if output == "-":
        sys.stdout.buffer.write(picture)
        sys.stdout.buffer.flush()
    else:
        write_file(Path(output), picture)
