"""`dlmctl distill cd`: options and wiring."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlmctl.commands.distill_options import (
    Attention,
    Batch,
    Blocks,
    Checkpoints,
    Ema,
    First,
    Gray,
    Images,
    Kind,
    LogEvery,
    Multipliers,
    Run,
    SaveMinutes,
    ScheduleOption,
    Steps,
    Width,
    network_config,
    train,
)
from dlmctl.commands.optimizer_options import MaxNorm, Rate, Warmup
from dlmctl.commands.options import Device, Quiet, Seed
from dlmctl.commands.ranks import on_every_rank
from dlmctl.records.errors import UsageError

if TYPE_CHECKING:
    from dlmctl.distill.image_checkpoints import Model, ModelConfig

OBJECTIVE = "Objective"
Sizes = tuple[Literal["unet", "mlp"] | None, int | None, str | None, int | None, str | None]
"""--network, --width, --multipliers, --blocks, --attention, as they were given."""
USES = {"solver": ("cd",), "scales": ("cd", "ct"), "stage_steps": ("ect",)}
"""Options that not all objectives have."""


@on_every_rank
def command(
    images: Images,
    output: Run,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="MODEL",
            help="A run or checkpoint of 'dlmctl distill teacher', or optimal:IMAGES, the exact "
            "denoiser of a set.",
        ),
    ] = None,
    objective: Annotated[
        Literal["cd", "ct", "ect"],
        typer.Option(
            help="cd distils the teacher's ODE; ct and ect need none and learn from the images: "
            "ct on the same grid, ect at levels that near each other in stages.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = "cd",
    solver: Annotated[
        Literal["heun", "euler"] | None,
        typer.Option(
            show_default="heun", help="The teacher's step, for cd.", rich_help_panel=OBJECTIVE
        ),
    ] = None,
    scales: Annotated[
        int | None,
        typer.Option(
            min=2,
            show_default="40",
            help="Points of the grid of levels, for cd and ct.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    stage_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default="an eighth of --steps",
            help="Steps after which ect halves the distance of its levels.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    target_ema: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            show_default="0.95, for ect 0",
            help="Decay of the target network; 0 takes the student itself.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    loss: Annotated[
        Literal["l2", "huber"] | None,
        typer.Option(
            show_default="l2, for ect huber",
            help="Distance from the target: l2 is its square; huber is pseudo-Huber.",
            rich_help_panel=OBJECTIVE,
        ),
    ] = None,
    init: Annotated[
        Literal["teacher", "scratch"],
        typer.Option(help="First weights of the student.", rich_help_panel=OBJECTIVE),
    ] = "teacher",
    network: Kind = None,
    width: Width = None,
    multipliers: Multipliers = None,
    blocks: Blocks = None,
    attention: Attention = None,
    steps: Steps = 2000,
    batch_size: Batch = 128,
    rate: Rate = 2e-3,
    warmup: Warmup = 0,
    schedule: ScheduleOption = "cosine",
    grad_norm: MaxNorm = 1.0,
    ema: Ema = 0.999,
    checkpoints: Checkpoints = 8,
    first_checkpoint: First = 100,
    log_every: LogEvery = 100,
    save_minutes: SaveMinutes = 10.0,
    gray: Gray = False,
    seed: Seed = 0,
    device: Device = "auto",
    quiet: Quiet = False,
) -> None:
    """Distil a diffusion model into one that samples in one step.

    A consistency model (Song et al. 2023) in the frame of EDM, trained by RAdam; the network is the
    teacher's, unless --init scratch and its options say another. IMAGES are what noise is added to:
    those of the teacher, or others. The published losses are perceptual distances; l2 and huber on
    pixels are what small images need (ours). The published ct lets --scales and --target-ema grow
    over training; here both stay as they are given (ours). For several processes under torchrun see
    'dlmctl distill teacher'.

    Examples:

    dlmctl distill cd builtin:digits#0:128 --teacher runs/teacher -o runs/student

    dlmctl distill cd builtin:digits#0:128 --objective ect --init scratch -o runs/ect
    """
    from dlmctl.distill.consistency_model import ECT_STAGES, Distillation
    from dlmctl.distill.image_checkpoints import load_model
    from dlmctl.distill.image_runs import student_run
    from dlmctl.distill.image_sets import read_images
    from dlmctl.distill.image_training import Recipe
    from dlmctl.models.loading import resolve_device

    for name, given in (("solver", solver), ("scales", scales), ("stage_steps", stage_steps)):
        if given is not None and objective not in USES[name]:
            raise UsageError(f"--{name.replace('_', '-')} is not for --objective {objective}")
    if teacher is None and (objective == "cd" or init == "teacher"):
        what = "--objective cd" if objective == "cd" else "--init teacher"
        raise UsageError(f"{what} needs --teacher")
    place = resolve_device(device)
    data = read_images(images, gray)
    found = load_model(teacher, place) if teacher else None
    sizes = (network, width, multipliers, blocks, attention)
    config = student_config(found, tuple(data.shape[1:]), init == "teacher", sizes)
    ect = objective == "ect"
    plan = Distillation(
        objective,
        solver or "heun",
        scales or 40,
        (0.0 if ect else 0.95) if target_ema is None else target_ema,
        loss or ("huber" if ect else "l2"),
        stage_steps or steps / ECT_STAGES,
    )
    recipe = Recipe(
        steps,
        batch_size,
        rate,
        "radam",
        warmup,
        schedule,
        grad_norm,
        ema,
        checkpoints,
        first_checkpoint,
        seed,
    )
    about = {"images": images, "gray": gray}
    run = student_run(output, config, plan, found, init == "teacher", data, recipe, about, place)
    train(run, log_every, save_minutes, quiet)


def student_config(
    teacher: Model | None, shape: tuple[int, ...], from_teacher: bool, sizes: Sizes
) -> ModelConfig:
    """The student of a teacher, or one without; raises UsageError where they do not fit."""
    from dlmctl.distill.image_checkpoints import ModelConfig

    if teacher is not None:
        if teacher.kind == "consistency":
            raise UsageError(f"--teacher {teacher.name} is a student itself, not a denoiser")
        if teacher.shape != shape:
            raise UsageError(
                f"--teacher {teacher.name} makes {_shape(teacher.shape)}, and IMAGES are "
                f"{_shape(shape)}"
            )
    base = teacher.config if teacher else None
    own = any(size is not None for size in sizes)
    if from_teacher and base is None:
        raise UsageError("an exact denoiser has no weights to begin with: give --init scratch")
    if from_teacher and own:
        raise UsageError("the student has the teacher's network; give sizes with --init scratch")
    if base is None:
        return ModelConfig("consistency", network_config(shape, *sizes))
    network = network_config(shape, *sizes) if own else base.network
    return ModelConfig("consistency", network, base.sigma_data, base.noise)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
