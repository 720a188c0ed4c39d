"""`dlmctl distill lcm`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from dlmctl.commands.distill_teacher import take_steps
from dlmctl.commands.ranks import on_every_rank
from dlmctl.commands.tracking import check_trackers
from dlmctl.settings import Knob
from dlmctl.settings.compute import DeviceName
from dlmctl.settings.distill import GuidedDistillation
from dlmctl.settings.images import Reports, Run, Training
from dlmctl.settings.streams import Quiet


@on_every_rank
def command(
    data: Annotated[
        str,
        Knob(
            "Records or a data set of images with their texts: a column image or images, and a "
            "column prompt, text or caption.",
            metavar="DATA",
            argument=True,
        ),
    ],
    output: Run,
    teacher: Annotated[
        Path,
        Knob(
            "A pipeline of diffusers of the kind of Stable Diffusion 1 and 2.",
            "--teacher",
            metavar="PIPELINE",
        ),
    ],
    plan: GuidedDistillation = GuidedDistillation(),
    training: Training = Training(steps=1000, batch_size=16, rate=8e-6, warmup=0, checkpoints=1),
    reports: Reports = Reports(),
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Distil a text-to-image model into one of few steps.

    Trains a latent consistency model (Luo et al. 2023) that takes the guidance scale as an input,
    and so evaluates its network once per step where the teacher does twice. Images are encoded to
    the means of their latents, and are of the size that the teacher makes. The optimizer is RAdam,
    in float32 (ours). The student is a LatentConsistencyModelPipeline of diffusers.

    Examples:

    dlmctl distill lcm images.jsonl --teacher stable-diffusion-v1-5 --steps 2000 -o runs/lcm

    dlmctl distill sample runs/lcm --prompts prompts.txt --steps 4 -n 64 -o samples.safetensors
    """
    from dlmctl.distill.text_pipelines import load_text_pipeline
    from dlmctl.distill.text_runs import guided_run, read_captioned
    from dlmctl.models.loading import resolve_device

    check_trackers(reports.log)
    place = resolve_device(device)
    images, texts = read_captioned(data)
    model = load_text_pipeline(teacher, place)
    run = guided_run(output, model, plan, images, texts, training, {"images": data})
    take_steps(run, reports, quiet)
