"""`dlmctl tensorboard`: options and wiring."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from dlmctl.settings import Knob
from dlmctl.settings.streams import OnErrorOption


def command(
    runs: Annotated[
        list[str] | None,
        Knob(
            "Directories of runs, or JSONL files; none, or -, is stdin.",
            metavar="RUN",
            argument=True,
            shown_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, Knob("The directory for 'tensorboard --logdir'.", "-o", "--output", metavar="DIR")
    ] = Path("tensorboard"),
    x: Annotated[str, Knob("The field that is the step.", "-x", metavar="FIELD")] = "step",
    on_error: OnErrorOption = "fail",
) -> None:
    """Write metrics records as event files of TensorBoard.

    Reads the metrics.jsonl of runs of 'dlmctl update', 'distill' and 'sae-train', or any JSONL with
    numbers and a step. Each run gets a folder in DIR, and each autoencoder a folder in that of its
    run. Every number of a record becomes a scalar of its name. Called again, even while a run goes
    on, it adds the new steps.

    Example:

    dlmctl tensorboard runs/a runs/b -o logs && tensorboard --logdir logs
    """
    from dlmctl.report.event_files import run_records, write_events

    added = write_events(run_records(runs or [], on_error), output, x)
    for line, steps in added.items():
        print(f"dlmctl: {output / line}: {steps} new steps", file=sys.stderr)
