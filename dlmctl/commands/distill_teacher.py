"""`dlmctl distill teacher`: options and wiring."""

from __future__ import annotations

from typing import Annotated

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

NOISE = "Noise"


@on_every_rank
def command(
    images: Images,
    output: Run,
    network: Kind = None,
    width: Width = None,
    multipliers: Multipliers = None,
    blocks: Blocks = None,
    attention: Attention = None,
    sigma_data: Annotated[
        float,
        typer.Option(min=0.0, help="Scale of the data in EDM's scalings.", rich_help_panel=NOISE),
    ] = 0.5,
    sigma_min: Annotated[
        float, typer.Option(help="Smallest level of noise.", rich_help_panel=NOISE)
    ] = 0.002,
    sigma_max: Annotated[
        float,
        typer.Option(help="Largest level, where sampling begins.", rich_help_panel=NOISE),
    ] = 80.0,
    rho: Annotated[
        float,
        typer.Option(min=1.0, help="Bend of the grid of levels.", rich_help_panel=NOISE),
    ] = 7.0,
    p_mean: Annotated[
        float,
        typer.Option(help="Mean of ln sigma in training.", rich_help_panel=NOISE),
    ] = -1.2,
    p_std: Annotated[
        float,
        typer.Option(min=0.0, help="Its standard deviation.", rich_help_panel=NOISE),
    ] = 1.2,
    steps: Steps = 6000,
    batch_size: Batch = 128,
    rate: Rate = 2e-3,
    warmup: Warmup = 100,
    schedule: ScheduleOption = "constant",
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
    """Train a diffusion model on a set of images or vectors.

    A denoiser by EDM (Karras et al. 2022): its scalings, its law of the noise, its weight, Adam.
    Nothing is augmented and there is no dropout, so that a small set is memorized in time: the
    checkpoints let one follow when. Writes metrics to standard output and RUN/metrics.jsonl. The
    same command goes on with a run that was killed.

    Under torchrun the images of a step are divided among the processes and their gradients summed:
    the steps, and the files, are those of one process, and a run can go on with more or fewer. Each
    process has the whole network, which is small, and no share of it as in 'dlmctl update'.

    Examples:

    dlmctl distill teacher builtin:digits#0:128 -o runs/teacher

    dlmctl distill sample runs/teacher -n 1000 -o samples.safetensors

    torchrun --nproc-per-node 4 -m dlmctl distill teacher images/ -b 512 -o runs/large
    """
    from dlmctl.distill.edm import NoiseLaw, NoiseRange
    from dlmctl.distill.image_checkpoints import ModelConfig
    from dlmctl.distill.image_runs import teacher_run
    from dlmctl.distill.image_sets import read_images
    from dlmctl.distill.image_training import Recipe
    from dlmctl.models.loading import resolve_device

    if not 0 < sigma_min < sigma_max:
        raise UsageError(f"--sigma-min {sigma_min:g} and --sigma-max {sigma_max:g} are no range")
    if not sigma_data:
        raise UsageError("--sigma-data is above 0")
    place = resolve_device(device)
    data = read_images(images, gray)
    sizes = network_config(tuple(data.shape[1:]), network, width, multipliers, blocks, attention)
    config = ModelConfig("edm", sizes, sigma_data, NoiseRange(sigma_min, sigma_max, rho))
    law = NoiseLaw(p_mean, p_std)
    recipe = Recipe(
        steps=steps,
        batch_size=batch_size,
        rate=rate,
        warmup=warmup,
        schedule=schedule,
        max_norm=grad_norm,
        ema=ema,
        checkpoints=checkpoints,
        first=first_checkpoint,
        seed=seed,
    )
    about = {"images": images, "gray": gray}
    run = teacher_run(output, config, law, data, recipe, about, place)
    train(run, log_every, save_minutes, quiet)
