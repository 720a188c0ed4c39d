"""Runs of a teacher and of a student: their first weights, and their losses."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlmctl.diffusion.noise import stream_key
from dlmctl.distill.consistency_model import distillation_loss
from dlmctl.distill.diffusers_models import is_discrete, new_unet, student_of
from dlmctl.distill.diffusers_networks import DiffusersConfig
from dlmctl.distill.edm import EdmDenoiser, edm_loss
from dlmctl.distill.image_checkpoints import ImageModel, ModelConfig, student
from dlmctl.distill.image_networks import make_network, network_config
from dlmctl.distill.image_sets import bare_name
from dlmctl.distill.image_training import TrainingRun
from dlmctl.distill.trigflow import trigflow_loss
from dlmctl.records.errors import UsageError
from dlmctl.settings.distill import CONTINUOUS, TANGENT_WARMUP, Distillation
from dlmctl.settings.images import (
    NetworkSizes,
    NoiseLaw,
    NoiseRange,
    Training,
    reading_options,
)


def teacher_run(
    directory: Path,
    config: ModelConfig,
    law: NoiseLaw,
    images: Tensor,
    recipe: Training,
    about: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> TrainingRun:
    """Begin a denoiser, or resume the one in the directory; raises as `TrainingRun`."""

    def loss(
        network: nn.Module,
        _target: nn.Module,
        batch: Tensor,
        _step: int,
        random: torch.Generator,
        own: slice,
    ) -> Tensor:
        return edm_loss(EdmDenoiser(network, config.sigma_data), batch, law, random, own)

    about = {"objective": "edm", "noise_mean": law.mean, "noise_std": law.std, **about}
    network = new_network(config, recipe.seed)
    return TrainingRun(directory, config, network, loss, images, recipe, about, device=device)


def student_run(
    directory: Path,
    config: ModelConfig,
    plan: Distillation,
    teacher: ImageModel | None,
    images: Tensor,
    recipe: Training,
    about: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> TrainingRun:
    """Begin a student, or resume the one in the directory; raises as `TrainingRun`.

    Args:
        teacher: frozen; with `plan.init` "teacher" the student begins with a copy of its network.
        images: uint8 or float32 [N, ...].
    """
    if plan.objective in CONTINUOUS and recipe.dtype != "float32":
        raise UsageError(
            f"--dtype {recipe.dtype} is too coarse for the derivative that {plan.objective} takes"
        )
    stage_steps = plan.steps_per_stage(recipe.steps)
    tangent_warmup = plan.tangent_warmup or max(1, recipe.steps // TANGENT_WARMUP)
    followed = teacher.function if teacher and plan.needs_teacher else None

    def loss(
        network: nn.Module,
        target: nn.Module,
        batch: Tensor,
        step: int,
        random: torch.Generator,
        own: slice,
    ) -> Tensor:
        model = student(config, network)
        if plan.objective in CONTINUOUS:
            share = min(1.0, step / tangent_warmup)
            return trigflow_loss(model, followed, batch, share, config.noise, random, own)
        pair, stage = (model, student(config, target)), int(step // stage_steps)
        return distillation_loss(plan, *pair, followed, batch, stage, config.noise, random, own)

    if plan.init == "teacher" and teacher is not None and teacher.network is not None:
        network = copy.deepcopy(teacher.network)
    else:
        network = new_network(config, recipe.seed)
    source = {"teacher": teacher.name, "teacher_revision": teacher.revision} if teacher else {}
    paced = {"stage_steps": stage_steps, "tangent_warmup": tangent_warmup}
    about = {**asdict(plan), **paced, **source, **about}
    return TrainingRun(
        directory, config, network, loss, images, recipe, about, plan.target_ema or 0.0, device
    )


def student_config(
    teacher: ImageModel | None, shape: tuple[int, ...], plan: Distillation, sizes: NetworkSizes
) -> ModelConfig:
    """The student of a teacher, or without one.

    Raises:
        UsageError: teacher, images and options do not fit each other.
    """
    if teacher is not None:
        if teacher.kind == "consistency":
            raise UsageError(f"--teacher {teacher.name} is a student itself, not a denoiser")
        if teacher.shape != shape:
            made, given = ("x".join(map(str, each)) for each in (teacher.shape, shape))
            raise UsageError(f"--teacher {teacher.name} makes {made}, and IMAGES are {given}")
    base = teacher.config if teacher else None
    if plan.init == "teacher" and base is None:
        raise UsageError("an exact denoiser has no weights to begin with: give --init scratch")
    if plan.init == "teacher" and sizes != NetworkSizes():
        raise UsageError("the student has the teacher's network; give sizes with --init scratch")
    noise = teacher.noise if teacher else NoiseRange()
    if plan.sigma_max is not None:
        if plan.sigma_max > noise.sigma_max:
            raise UsageError(
                f"--sigma-max {plan.sigma_max:g} is more noise than the {noise.sigma_max:g} that "
                "the teacher knows"
            )
        noise = replace(noise, sigma_max=plan.sigma_max)
    still = 0.0 if plan.objective in CONTINUOUS else None
    if base is None:
        new = network_config(shape, sizes)
        return ModelConfig("consistency", new, noise=noise, identity_at=still)
    if sizes != NetworkSizes():
        if teacher and teacher.autoencoder:
            raise UsageError("a student of latents has the U-Net of its teacher: give no sizes")
        new = network_config(shape, sizes)
        return ModelConfig("consistency", new, base.sigma_data, noise, still)
    if not isinstance(base.network, DiffusersConfig):
        return ModelConfig("consistency", base.network, base.sigma_data, noise, still)
    if is_discrete(base.network):
        if plan.sigma_max is not None:
            raise UsageError(
                f"--sigma-max is not for a student of {teacher.name if teacher else ''}, which "
                "diffusers samples from the last timestep on"
            )
        still = None  # its c_skip says where it is the identity
    network = student_of(base.network, noise, plan.objective in CONTINUOUS)
    return ModelConfig("consistency", network, base.sigma_data, noise, still)


def training_data(teacher: ImageModel | None, images: Tensor) -> Tensor:
    """Images as a teacher's student is trained on them: in latents, if that is what it makes.

    Raises:
        UsageError: their latents have another shape than the teacher's.
    """
    if teacher is None or teacher.autoencoder is None or images.shape[1:] == teacher.shape:
        return images
    return teacher.autoencoder.encode_for(images, teacher.shape, teacher.name)


def new_network(config: ModelConfig, seed: int) -> nn.Module:
    """A network whose initial weights are a function of the seed."""
    torch.manual_seed(stream_key(seed, "weights"))
    if isinstance(config.network, DiffusersConfig):
        return new_unet(config.network)
    return make_network(config.network)


def reading_note(teacher: ImageModel, about: Mapping[str, Any]) -> str | None:
    """What is to be said if a teacher's images were read otherwise than those of a student; None
    if they were not, or if it is not recorded.

    Args:
        about: `images` and the reading of the student's, as a run records them.

    Raises:
        UsageError: they are images of one source.
    """
    trained = teacher.training or {}
    before, now = reading_options(trained), reading_options(about)
    if "images" not in trained or before == now:
        return None
    what = f"{teacher.name} was trained on {trained['images']} {before or 'as it is'}"
    if bare_name(trained["images"]) == bare_name(about["images"]):
        raise UsageError(
            f"{what}: read the images of its student alike, not {now or 'as they are'}"
        )
    return f"{what}, and these images are read {now or 'as they are'}"
