"""`dlmctl distill cd`: options and wiring."""

from __future__ import annotations

import sys
from typing import Annotated

from dlmctl.commands.distill_teacher import take_steps
from dlmctl.commands.ranks import on_every_rank
from dlmctl.commands.tracking import check_trackers
from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob
from dlmctl.settings.compute import DeviceName
from dlmctl.settings.distill import Distillation
from dlmctl.settings.images import ImageReading, Images, NetworkSizes, Reports, Run, Training
from dlmctl.settings.streams import Quiet


@on_every_rank
def command(
    images: Images,
    output: Run,
    plan: Distillation,
    teacher: Annotated[
        str | None,
        Knob(
            "A run or checkpoint of 'dlmctl distill teacher', a pipeline of diffusers, or "
            "optimal:IMAGES, the exact denoiser of a set.",
            "--teacher",
            metavar="MODEL",
        ),
    ] = None,
    sizes: NetworkSizes = NetworkSizes(),
    training: Training = Training(steps=2000, warmup=0, schedule="cosine"),
    reports: Reports = Reports(),
    reading: ImageReading = ImageReading(),
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Distil a diffusion model into one that samples in one step.

    Trains a consistency model (Song et al. 2023), parameterized as in EDM, with RAdam. Its network
    is the teacher's, unless --init scratch and its options define another. IMAGES are the images
    that noise is added to: those of the teacher, or others. The published losses are perceptual
    distances; small images need l2 or huber on pixels (ours). In the published ct, --scales and
    --target-ema grow during training; here both are fixed (ours). scd and sct are sCM (Lu and Song
    2024) without the weights that it learns (ours). To use several processes under torchrun, see
    'dlmctl distill teacher'.

    The teacher can be a directory of diffusers, of an unconditional model: a pipeline, or a U-Net
    with its scheduler_config.json. Its student is such a directory, too. For a pipeline with a VAE,
    IMAGES are encoded, unless they are latents already.

    Examples:

    dlmctl distill cd builtin:digits#0:128 --teacher runs/teacher -o runs/student

    dlmctl distill cd builtin:digits#0:128 --objective ect --init scratch -o runs/ect
    """
    from dlmctl.distill.image_checkpoints import load_model
    from dlmctl.distill.image_runs import (
        reading_note,
        student_config,
        student_run,
        training_data,
    )
    from dlmctl.distill.image_sets import training_pixels
    from dlmctl.models.loading import resolve_device
    from dlmctl.train.distributed import is_first

    check_trackers(reports.log)
    if teacher is None and (plan.needs_teacher or plan.init == "teacher"):
        what = f"--objective {plan.objective}" if plan.needs_teacher else "--init teacher"
        raise UsageError(f"{what} needs --teacher")
    place = resolve_device(device)
    data = training_pixels(images, reading)
    model = load_model(teacher, place, reading=reading) if teacher else None
    data = training_data(model, data)
    config = student_config(model, tuple(data.shape[1:]), plan, sizes)
    about = {"images": images, **reading.recorded()}
    note = reading_note(model, about) if model else None
    if note and is_first():
        print(f"dlmctl: {note}", file=sys.stderr)
    run = student_run(output, config, plan, model, data, training, about, place)
    take_steps(run, reports, quiet)
