"""`dlmctl tensorboard`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.options import OnErrorOption


def command(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", help="Directories of runs, or JSONL files; none, or -, is stdin."
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="What 'tensorboard --logdir' has.")
    ] = Path("tensorboard"),
    x: Annotated[str, typer.Option("-x", metavar="FIELD", help="What is the step.")] = "step",
    on_error: OnErrorOption = "fail",
) -> None:
    """Write metrics records as event files of TensorBoard.

    Reads the metrics.jsonl of runs of 'dlmctl update', 'distill' and 'sae-train', or any JSONL with
    numbers and a step, and gives each run a folder in DIR, each autoencoder one in its run's. Every
    number of a record becomes a scalar of its name. Called again it adds the steps that are new,
    also while a run goes on.

    Example:

    dlmctl tensorboard runs/a runs/b -o logs && tensorboard --logdir logs
    """
    from dlmctl.report.event_files import run_records, write_events

    added = write_events(run_records(runs or [], on_error), output, x)
    for line, steps in added.items():
        print(f"dlmctl: {output / line}: {steps} new steps", file=sys.stderr)
