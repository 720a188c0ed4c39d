"""Options of training a teacher or a student: the network, and the optimization."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlmctl.commands.optimizer_options import OPTIMIZER
from dlmctl.commands.ranks import write_metrics
from dlmctl.records.errors import UsageError
from dlmctl.settings.parsing import whole_numbers

if TYPE_CHECKING:
    from dlmctl.distill.image_networks import NetworkConfig
    from dlmctl.distill.image_training import TrainingRun

NETWORK = "Network"
Images = Annotated[
    str,
    typer.Argument(
        metavar="IMAGES",
        help="builtin:digits, a folder of images, a safetensors file (bytes, or floats in [-1, 1] "
        "or [0, 1]), or a data set; #A:B behind it takes the images from A to B.",
    ),
]
Run = Annotated[
    Path,
    typer.Option(
        "-o",
        "--output",
        metavar="RUN",
        help="Directory of the run: checkpoints, the link 'latest', metrics.jsonl.",
    ),
]
Gray = Annotated[bool, typer.Option("--gray", help="Take colours as their luminance.")]
Kind = Annotated[
    Literal["unet", "mlp"] | None,
    typer.Option(
        "--network",
        show_default="unet for images from 16x16 on, else mlp",
        help="A U-Net, or a residual MLP on the flat input.",
        rich_help_panel=NETWORK,
    ),
]
Width = Annotated[
    int | None,
    typer.Option(
        min=4,
        show_default="32, of an mlp 256",
        help="Channels of the finest level; hidden units of an mlp.",
        rich_help_panel=NETWORK,
    ),
]
Multipliers = Annotated[
    str | None,
    typer.Option(
        metavar="M,…",
        show_default="1,2,2",
        help="Channels of each level by the width; each level halves the resolution.",
        rich_help_panel=NETWORK,
    ),
]
Blocks = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="2",
        help="Residual blocks of a level and direction; of an mlp, all.",
        rich_help_panel=NETWORK,
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="LEVEL,…",
        show_default="none",
        help="Levels with self-attention, 1 the finest.",
        rich_help_panel=NETWORK,
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Steps of training.", rich_help_panel=OPTIMIZER)]
Batch = Annotated[
    int,
    typer.Option(
        "-b",
        "--batch-size",
        min=1,
        help="Images in a step, drawn with replacement.",
        rich_help_panel=OPTIMIZER,
    ),
]
ScheduleOption = Annotated[
    Literal["constant", "cosine"],
    typer.Option(
        "--schedule",
        help="Learning rate after warm-up; cosine falls to 0 at the last step.",
        rich_help_panel=OPTIMIZER,
    ),
]
Ema = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Decay of the average of the weights that checkpoints hold, smaller at first; 0 "
        "saves the weights themselves.",
        rich_help_panel=OPTIMIZER,
    ),
]
Checkpoints = Annotated[
    int,
    typer.Option(
        min=1,
        help="Checkpoints, all of which stay: from --first-checkpoint to the last step by a "
        "constant factor.",
    ),
]
First = Annotated[int, typer.Option("--first-checkpoint", min=1, help="Step of the first.")]
LogEvery = Annotated[int, typer.Option(min=1, help="Steps between the records.")]
SaveMinutes = Annotated[
    float, typer.Option(min=0.0, help="Minutes between states that a killed run goes on from.")
]


def network_config(
    shape: tuple[int, ...],
    kind: Literal["unet", "mlp"] | None,
    width: int | None,
    multipliers: str | None,
    blocks: int | None,
    attention: str | None,
) -> NetworkConfig:
    """The network of these options; raises UsageError where they do not go together."""
    from dlmctl.distill.image_networks import NetworkConfig

    kind = kind or ("unet" if len(shape) == 3 and min(shape[1:]) >= 16 else "mlp")
    if kind == "mlp":
        if multipliers or attention:
            raise UsageError("--multipliers and --attention are for --network unet")
        return NetworkConfig("mlp", shape, width or 256, (), blocks or 2)
    levels = whole_numbers("--attention", attention) if attention else []
    return NetworkConfig(
        "unet",
        shape,
        width or 32,
        tuple(whole_numbers("--multipliers", multipliers or "1,2,2")),
        blocks or 2,
        tuple(level - 1 for level in levels),
    )


def train(run: TrainingRun, log_every: int, save_minutes: float, quiet: bool) -> None:
    """Take the steps of a run and write its records."""
    from dlmctl.train.distributed import is_first

    said = f"{run.directory} is trained already"
    if not run.finished:
        said = f"{run.directory}/latest is the model"
        write_metrics(
            run.train(log_every, 60 * save_minutes),
            quiet,
            run.standing,
            run.recipe.steps,
            run.step,
            at=lambda: run.step,
        )
    if is_first():
        print(f"dlmctl: {said}", file=sys.stderr)
