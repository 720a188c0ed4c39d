"""`dlmctl bench loop`: options and wiring."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.options import BatchSize, Device, Dtype, Json, Model, Quiet, Seed
from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows


def command(
    model: Model = "builtin:puzzles",
    task: Annotated[str, typer.Option(help="Prompts, as in 'dlmctl rollout'.")] = "sudoku",
    rounds: Annotated[
        int, typer.Option(min=3, help="Rounds of each loop; the first is not timed.")
    ] = 20,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in a round.")] = 32,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=2, help="Completions for each prompt.")
    ] = 8,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """What the loop as a pipe costs beside the same stages in one process.

    Runs rollout, verify and update (RSPO) in this process; then 'rollout --follow RUN | verify |
    update -o RUN' with lag 0, and with lag 1, where sampling and training overlap. Writes for each:
    seconds of a round, the median; ratio to the first row; same, whether the weights at the end are
    those of the first row (with lag 1 samples may be a round older, and then they are not).

    Examples:

    dlmctl bench loop

    dlmctl bench loop --task countdown --rounds 50
    """
    from dlmctl.bench.loop import Loop, compare_loops

    loop = Loop(model, task, rounds, prompts, samples, batch_size, seed, device, dtype)
    names = ["loop", "rounds", "seconds_per_round", "ratio", "same"]
    with counting("rounds", quiet, 3 * rounds) as gauge:
        write_rows(compare_loops(loop, [0, 1], gauge.advance), names, json)
