"""`dlmctl advantage`: options and wiring of the stage."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dlmctl.commands.options import Files, OnErrorOption, Output, Quiet
from dlmctl.commands.progress import counted
from dlmctl.records.jsonl import read_records, write_records


def command(
    files: Files = None,
    baseline: Annotated[
        Literal["mean", "loo", "none"],
        typer.Option(
            help="What is taken from a reward: the group's mean, the mean of the others "
            "(leave-one-out), or nothing."
        ),
    ] = "mean",
    scale: Annotated[
        Literal["none", "group", "batch"],
        typer.Option(
            help="Divide by the standard deviation of the group, or of the whole input (which is "
            "then held in memory)."
        ),
    ] = "none",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Turn the rewards of a group into advantages.

    Reads records with `reward`, where the samples of a prompt are neighbours, and writes them with
    `advantage`: how much better the sample is than the others of its group. A group of one, and a
    group with equal rewards, has advantage 0.

    `dlmctl update` computes the same by itself where records lack it.
    """
    from dlmctl.rl.advantage_stage import advantage

    records = advantage(read_records(files or [], on_error), baseline, scale)
    write_records(counted(records, "records", quiet), output)
