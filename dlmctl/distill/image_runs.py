"""A teacher's run and a student's: what network begins, and what loss it has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlmctl.diffusion.noise import stream_key
from dlmctl.distill.consistency_model import ConsistencyModel, Distillation
from dlmctl.distill.edm import EdmDenoiser, NoiseLaw, edm_loss
from dlmctl.distill.image_checkpoints import Model, ModelConfig
from dlmctl.distill.image_networks import make_network
from dlmctl.distill.image_training import Recipe, TrainingRun


def teacher_run(
    directory: Path,
    config: ModelConfig,
    law: NoiseLaw,
    images: Tensor,
    recipe: Recipe,
    about: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> TrainingRun:
    """Begin a denoiser, or go on with the one in the directory; raises as `TrainingRun`."""

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
    teacher: Model | None,
    from_teacher: bool,
    images: Tensor,
    recipe: Recipe,
    about: Mapping[str, Any],
    device: torch.device | str = "cpu",
) -> TrainingRun:
    """Begin a student, or go on with the one in the directory; raises as `TrainingRun`.

    Args:
        teacher: frozen; of its network the student begins with a copy if `from_teacher`.
    """

    def wrapped(network: nn.Module) -> ConsistencyModel:
        return ConsistencyModel(network, config.sigma_data, config.noise.sigma_min)

    def loss(
        network: nn.Module,
        target: nn.Module,
        batch: Tensor,
        step: int,
        random: torch.Generator,
        own: slice,
    ) -> Tensor:
        denoiser = teacher.function if teacher else None
        pair = (wrapped(network), wrapped(target))
        return plan.loss(*pair, denoiser, batch, step, config.noise, random, own)

    if from_teacher and teacher is not None and teacher.network is not None:
        network = copy.deepcopy(teacher.network)
    else:
        network = new_network(config, recipe.seed)
    source = {"teacher": teacher.name, "teacher_revision": teacher.revision} if teacher else {}
    init = {"init": "teacher" if from_teacher else "scratch"}
    about = {**asdict(plan), **init, **source, **about}
    return TrainingRun(
        directory, config, network, loss, images, recipe, about, plan.target_ema, device
    )


def new_network(config: ModelConfig, seed: int) -> nn.Module:
    """A network whose first weights are a function of the seed."""
    torch.manual_seed(stream_key(seed, "weights"))
    return make_network(config.network)
