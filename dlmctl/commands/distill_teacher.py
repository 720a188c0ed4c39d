"""`dlmctl distill teacher`: options and wiring."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from dlmctl.commands.ranks import on_every_rank, write_metrics
from dlmctl.commands.tracking import check_trackers, tracked
from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob
from dlmctl.settings.compute import DeviceName
from dlmctl.settings.images import (
    NOISE,
    ImageReading,
    Images,
    NetworkSizes,
    NoiseLaw,
    NoiseRange,
    Reports,
    Run,
    Training,
)
from dlmctl.settings.streams import Quiet

if TYPE_CHECKING:
    from dlmctl.distill.image_training import TrainingRun


@on_every_rank
def command(
    images: Images,
    output: Run,
    sizes: NetworkSizes = NetworkSizes(),
    sigma_data: Annotated[
        float, Knob("Standard deviation of the data in EDM's scalings.", minimum=0.0, panel=NOISE)
    ] = 0.5,
    noise: NoiseRange = NoiseRange(),
    law: NoiseLaw = NoiseLaw(),
    training: Training = Training(),
    reports: Reports = Reports(),
    reading: ImageReading = ImageReading(),
    device: DeviceName = "auto",
    quiet: Quiet = False,
) -> None:
    """Train a diffusion model on a set of images or vectors.

    Trains a denoiser by EDM (Karras et al. 2022), with its scalings, noise distribution and loss
    weight, using Adam. Without --dropout and --flip the model memorizes a small set in time; the
    checkpoints show when. Writes metrics to standard output and RUN/metrics.jsonl. The same command
    resumes a run that was killed.

    A folder of images is read with the folders in it; its splits are folders train, test and so on.
    Images of several sizes become one size by --resize and --crop. White stands behind
    transparency, and images are turned as their EXIF says. A run records how its images were read,
    and does not resume if they are read otherwise. Images that are stored as bytes are kept so.

    Under torchrun the images of a step are divided among the processes and their gradients are
    summed: the steps, and the files, are those of one process (up to rounding with --dtype
    bfloat16), and a run can be resumed with more or fewer processes. The network is small, so each
    process has the whole of it; 'dlmctl update' shards it.

    Examples:

    dlmctl distill teacher builtin:digits#0:128 -o runs/teacher

    dlmctl distill sample runs/teacher -n 1000 -o samples.safetensors

    torchrun --nproc-per-node 4 -m dlmctl distill teacher images/ --resize 64 --crop 64 -b 512
    -o runs/large
    """
    from dlmctl.distill.image_checkpoints import ModelConfig
    from dlmctl.distill.image_networks import network_config
    from dlmctl.distill.image_runs import teacher_run
    from dlmctl.distill.image_sets import training_pixels
    from dlmctl.models.loading import resolve_device

    check_trackers(reports.log)
    if not sigma_data:
        raise UsageError("--sigma-data is above 0")
    place = resolve_device(device)
    data = training_pixels(images, reading)
    config = ModelConfig("edm", network_config(tuple(data.shape[1:]), sizes), sigma_data, noise)
    about = {"images": images, **reading.recorded()}
    take_steps(teacher_run(output, config, law, data, training, about, place), reports, quiet)


def take_steps(run: TrainingRun, reports: Reports, quiet: bool) -> None:
    """Take the steps of a run and write its records."""
    from dlmctl.train.distributed import is_first

    outcome = f"{run.directory} is trained already"
    if not run.finished:
        outcome = f"{run.directory}/latest is the model"
        with tracked(reports.log, run.directory.path, run.about):
            write_metrics(
                run.train(reports.log_every, 60 * reports.save_minutes),
                quiet,
                run.standing,
                run.recipe.steps,
                run.step,
                at=lambda: run.step,
            )
    if is_first():
        print(f"dlmctl: {outcome}", file=sys.stderr)
