"""`dlmctl bench credit`: options and wiring."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.options import BatchSize, Device, Dtype, Json, Quiet, Seed
from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows


def command(
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="A model that answers in the layout; a completion that does not is never scored.",
        ),
    ],
    task: Annotated[str, typer.Option(help="Prompts, as in 'dlmctl rollout'.")] = "shapes",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds; the first is not timed.")] = 6,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts in a round.")] = 16,
    samples: Annotated[
        int, typer.Option("-n", "--samples", min=2, help="Completions for each prompt.")
    ] = 8,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    batch_size: BatchSize = 128,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """What the weights of SRPO cost beside a round of GRPO.

    Runs rollout, verify, advantage, advantage --algo srpo and update in this process, with their
    defaults and temperature 1. Writes for each stage, and for the round without and with the
    weights: seconds, the median over the rounds; ratio to the round without; and the share of the
    completions that were scored.

    Examples:

    dlmctl bench credit -m runs/shapes/base
    """
    from dlmctl.bench.credit import credit_cost
    from dlmctl.bench.loop import Loop
    from dlmctl.settings.srpo import Contrast

    plan = Loop(model, task, rounds, prompts, samples, batch_size, seed, device, dtype)
    with counting("rounds", quiet, rounds) as gauge:
        rows = credit_cost(plan, Contrast(), gauge.advance)
        write_rows(rows, ["stage", "seconds", "ratio", "scored"], json)
