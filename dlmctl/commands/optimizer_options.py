"""Options of training that say how steps are taken, and what is trained."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

OPTIMIZER, ADAPTER = "Optimizer", "Adapter and memory"

Rate = Annotated[
    float, typer.Option("--lr", min=0.0, help="Learning rate.", rich_help_panel=OPTIMIZER)
]
Warmup = Annotated[
    int, typer.Option(min=0, help="Steps of linear warm-up.", rich_help_panel=OPTIMIZER)
]
ScheduleOption = Annotated[
    Literal["constant", "cosine"],
    typer.Option(
        help="Learning rate after warm-up; cosine needs --total-steps.",
        rich_help_panel=OPTIMIZER,
    ),
]
TotalSteps = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="off",
        help="Where the cosine ends.",
        rich_help_panel=OPTIMIZER,
    ),
]
Beta1 = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="AdamW's first decay.", rich_help_panel=OPTIMIZER),
]
Beta2 = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="AdamW's second decay.", rich_help_panel=OPTIMIZER),
]
WeightDecay = Annotated[
    float,
    typer.Option(min=0.0, help="Decoupled, on matrices.", rich_help_panel=OPTIMIZER),
]
MaxNorm = Annotated[
    float,
    typer.Option(
        "--grad-norm",
        min=0.0,
        help="Clip the gradient to this norm; 0 does not.",
        rich_help_panel=OPTIMIZER,
    ),
]
LoraRank = Annotated[
    int,
    typer.Option(
        min=0,
        help="Train a LoRA adapter of this rank (128 in the literature); 0 trains all weights.",
        rich_help_panel=ADAPTER,
    ),
]
LoraAlpha = Annotated[
    float, typer.Option(min=0.0, help="Scale of the adapter.", rich_help_panel=ADAPTER)
]
LoraDropout = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Dropout in the adapter.", rich_help_panel=ADAPTER),
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing",
        help="Recompute activations in the backward pass from the start: less memory, a third "
        "more time. Without it, from when a micro-batch does not fit.",
        rich_help_panel=ADAPTER,
    ),
]
ResumeInput = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with the input too, which is the whole of it again: leave out what the run's "
        "newest checkpoint has been trained on. Without it what comes in is new.",
    ),
]
