"""`dlmctl top`: options and wiring."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

from dlmctl.records import stderr
from dlmctl.records.interrupts import describe
from dlmctl.settings import Knob


def command(
    runs: Annotated[list[Path], Knob("Directories of runs.", metavar="RUN", argument=True)],
    y: Annotated[
        list[str] | None,
        Knob(
            "What is drawn: a field of metrics.jsonl, or field/inner; repeatable.",
            "-y",
            metavar="MEASURE",
            shown_default="reward, accuracy, fve, loss, kl, … as far as a run has them",
        ),
    ] = None,
    total: Annotated[
        int | None,
        Knob(
            "Steps that there will be, for the time left.",
            "--total",
            metavar="STEPS",
            minimum=1,
            shown_default="what a run of sae-train or distill says of itself",
        ),
    ] = None,
    every: Annotated[
        float, Knob("Seconds from one look to the next.", "--every", minimum=0.1)
    ] = 1.0,
    once: Annotated[bool, Knob("Print one screen and end.", "--once")] = False,
) -> None:
    """Follow training runs on the terminal: curves, step, rate, time left.

    Reads the metrics.jsonl of runs of 'dlmctl update', 'distill' and 'sae-train' while they are
    written, and says which process trains, when it wrote last and which checkpoint is the newest.
    The rate is that of the steps seen, and at first that since the oldest checkpoint. Several
    autoencoders of a run are lines of one panel. In a pipe, or with --once, prints one screen as
    text. Ctrl-C ends it; the runs go on.

    Examples:

    dlmctl top runs/a

    dlmctl top runs/a runs/b -y reward -y kl --total 400 --once
    """
    from rich.console import Console
    from rich.live import Live

    from dlmctl.report.top_screen import screen
    from dlmctl.report.watched_run import WatchedRun

    watched = [WatchedRun(run, y or [], total) for run in runs]
    console = Console(highlight=False)
    braille = (console.encoding or "").lower().startswith("utf")
    if once or not sys.stdout.isatty() or not stderr.has_codes():
        console.print(screen(watched, console.width, None, braille))
        return
    describe(lambda: "the runs go on")
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            size = console.size
            live.update(screen(watched, size.width, size.height, braille), refresh=True)
            time.sleep(every)
            for run in watched:
                run.look()
