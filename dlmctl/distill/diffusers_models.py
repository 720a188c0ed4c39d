"""Models of diffusers: teachers and students from directories, and students into them.

A student of a discrete process is a pipeline that diffusers samples, a `DDPMPipeline` with an
`LCMScheduler`, or an `LDMPipeline` if there is a VAE:

    STUDENT/model_index.json, unet/, scheduler/, vqvae/
    STUDENT/dlmctl.json         how it was trained

diffusers has no scheduler for a student of an EDM teacher: `CMStochasticIterativeScheduler` gives
the network 1000 times the time that `EDMEulerScheduler` gives it. Such a student has no
model_index.json; its dlmctl.json says how the U-Net is part of f (see `consistency_model`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dlmctl.distill.consistency_model import ConsistencyModel
from dlmctl.distill.diffusers_directories import (
    AUTOENCODERS,
    CM,
    CONFIG,
    EDM,
    INDEX,
    LCM,
    RECORD,
    SCHEDULER,
    UNET,
    UNREADABLE,
    WEIGHTS,
    copy_text_parts,
    diffusers_class,
    first_line,
    load_part,
    make_scheduler,
    part_files,
    parts_of,
    scheduler_config,
    unet_config,
)
from dlmctl.distill.diffusers_networks import (
    CM_TIME,
    SHARP,
    VARIANCE_PRESERVING,
    ClippedConsistencyModel,
    DiffusersConfig,
    DiscreteDenoiser,
    DiscreteUnet,
    LatentConsistencyModel,
    LevelUnet,
    log_levels,
)
from dlmctl.distill.edm import EdmDenoiser
from dlmctl.distill.image_sets import as_floats
from dlmctl.models.weights import weights_hash
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import read_json
from dlmctl.settings.images import NoiseRange

LCM_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PROCESS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
"""What a scheduler's configuration says of a discrete process."""
CLIPS = {"DDPMScheduler": True, "DDIMScheduler": True, LCM: False}
"""Schedulers with `clip_sample`, and its default."""
LCM_STEPS = 50
"""Timesteps that LCMScheduler chooses from."""


class Loaded(NamedTuple):
    """What a directory has."""

    config: DiffusersConfig
    kind: Literal["edm", "consistency"]
    network: nn.Module
    sigma_data: float
    noise: NoiseRange
    identity_at: float | None
    training: Mapping[str, Any] | None
    revision: str


@dataclass(frozen=True)
class Autoencoder:
    """The map between images and a model's latents."""

    vae: Any
    device: torch.device

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Float [N, C, h, w] to images, float [N, 3, H, W], in [-1, 1] but for the VAE's errors."""
        config = self.vae.config
        scaled = latents.to(self.device) / config.scaling_factor + (config.get("shift_factor") or 0)
        images: Tensor = self.vae.decode(scaled).sample
        return images

    @torch.no_grad()
    def encode(self, images: Tensor, batch_size: int = 16) -> Tensor:
        """Images uint8 or float [N, 3, H, W] to latents [N, C, h, w] on the CPU.

        They are the mean of each (ours).

        Raises:
            UsageError: images of other channels than the VAE's.
        """
        config = self.vae.config
        if images.dim() != 4 or images.shape[1] != config.in_channels:
            shape = "x".join(map(str, images.shape[1:]))
            raise UsageError(f"the VAE takes images of {config.in_channels} channels, not {shape}")
        latents = []
        for part in images.split(batch_size):
            code = self.vae.encode(as_floats(part).to(self.device))
            mean = code.latent_dist.mean if hasattr(code, "latent_dist") else code.latents
            latents.append((mean - (config.get("shift_factor") or 0)) * config.scaling_factor)
        return torch.cat(latents).cpu()

    def encode_for(self, images: Tensor, shape: tuple[int, ...], teacher: str) -> Tensor:
        """The latents of images, as `encode`, for a teacher that makes latents of a shape.

        Raises:
            UsageError: they have another shape; or as `encode`.
        """
        latents = self.encode(images)
        if latents.shape[1:] != shape:
            sizes = (images.shape[1:], latents.shape[1:], shape)
            given, coded, expected = ("x".join(map(str, size)) for size in sizes)
            raise UsageError(
                f"images of {given} have latents of {coded}, and --teacher {teacher} makes "
                f"{expected}"
            )
        return latents


def load_directory(directory: Path) -> Loaded:
    """The model of a directory, without its VAE.

    Raises:
        MissingInputError: a part is missing.
        DataError: a part is damaged, or of a model that is not handled.
        UnavailableError: diffusers is not installed.
    """
    parts, path = parts_of(directory), directory / RECORD
    record = read_json(path) if path.is_file() else {}
    unet = unet_config(parts.unet / CONFIG)
    if parts.scheduler:
        chosen = scheduler_config(parts.scheduler)
    else:
        chosen = _recorded_scheduler(record, path)
    side = unet["sample_size"]
    shape = (unet.get("in_channels", 3), *(side if isinstance(side, list) else (side, side)))
    vae = str(parts.autoencoder) if parts.autoencoder else None
    config = DiffusersConfig(shape, unet, chosen, vae)
    scheduler = make_scheduler(chosen, str(parts.scheduler or path))
    student = config.scheduler_class in (LCM, CM) or not parts.scheduler
    network = wrap_unet(load_part(parts.unet, UNET), scheduler)
    return Loaded(
        config,
        "consistency" if student else "edm",
        network,
        _sigma_data(scheduler),
        _noise(scheduler),
        None if parts.scheduler else record.get("identity_at"),
        record.get("training"),
        weights_hash(part_files(parts.unet)),
    )


def _recorded_scheduler(record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    try:
        chosen = dict(record["network"]["scheduler"])
        if chosen["_class_name"] != EDM or record["kind"] != "consistency":
            raise ValueError("not a student of an EDM teacher")
        still = record["identity_at"]
        if still is not None and not 0 <= float(still) <= float(chosen["sigma_min"]):
            raise ValueError("a student is the identity at its smallest level or below")
    except UNREADABLE as error:
        raise DataError(f"not the record of a student ({first_line(error)})", str(path)) from None
    return chosen


def load_autoencoder(config: DiffusersConfig, device: torch.device) -> Autoencoder | None:
    """The VAE of a model of latents; raises as `load_directory`."""
    if config.autoencoder is None:
        return None
    directory = Path(config.autoencoder)
    path = directory / CONFIG
    about = read_json(path)
    kind = about.get("_class_name")
    if kind not in AUTOENCODERS:
        names = " and ".join(AUTOENCODERS)
        raise DataError(f"the autoencoder {kind!s:.60} is not handled; {names} are", str(path))
    if about.get("latents_mean") is not None or about.get("latents_std") is not None:
        raise DataError("latents of a stated mean and deviation are not handled", str(path))
    return Autoencoder(load_part(directory, kind).to(device), device)


def new_unet(config: DiffusersConfig) -> nn.Module:
    """The network with new weights, drawn from torch's global generator; raises DataError."""
    where = f"the U-Net of {config.scheduler_class}"
    try:
        unet = diffusers_class(UNET).from_config(dict(config.unet))
    except UNREADABLE as error:
        raise DataError(f"not a configuration ({first_line(error)})", where) from None
    return wrap_unet(unet, make_scheduler(config.scheduler, where))


def wrap_unet(unet: nn.Module, scheduler: Any) -> nn.Module:
    """A U-Net as F(x, c), of the preconditioning that the scheduler has; without its dropout."""
    for module in unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # it would mask memorization, and is drawn from no seed of a run
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(_contiguous)
    kind = type(scheduler).__name__
    if kind == CM:
        return LevelUnet(unet, 4 * CM_TIME, 1)
    prediction = scheduler.config.prediction_type
    if kind == EDM:
        return LevelUnet(unet, 1.0, -1 if prediction == "v_prediction" else 1)
    return DiscreteUnet(unet, log_levels(scheduler.alphas_cumprod), prediction)


def _contiguous(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # torch's forward derivative of a group norm takes no transposed input, as attention has it.
    return tuple(tensor.contiguous() for tensor in given)


def denoiser(config: DiffusersConfig, network: nn.Module, sigma_data: float) -> nn.Module:
    """D(x, sigma) around a teacher's network."""
    if config.scheduler_class == EDM:
        return EdmDenoiser(network, sigma_data)
    assert isinstance(network, DiscreteUnet)
    return DiscreteDenoiser(network, _clip(config.scheduler))


def consistency_model(
    config: DiffusersConfig, network: nn.Module, sigma_data: float, eps: float, sigma_min: float
) -> ConsistencyModel:
    """f(x, sigma) around a student's network.

    Args:
        eps: the level at which a student of an EDM teacher is the identity.
        sigma_min: the smallest level.
    """
    if config.scheduler_class == EDM:
        return ConsistencyModel(network, sigma_data, eps)
    if isinstance(network, LevelUnet):
        clip = 1.0 if config.scheduler.get("clip_denoised", True) else None
        return ClippedConsistencyModel(network, sigma_data, sigma_min, clip)
    assert isinstance(network, DiscreteUnet)
    scaling = float(config.scheduler.get("timestep_scaling", 10.0))
    return LatentConsistencyModel(network, sigma_min, scaling, _clip(config.scheduler))


def student_of(teacher: DiffusersConfig, noise: NoiseRange, continuous: bool) -> DiffusersConfig:
    """The configuration of a teacher's student.

    Args:
        noise: the levels of the student of an EDM teacher.
        continuous: f is to be D at all levels but the first, as continuous time needs it.
    """
    if teacher.scheduler_class == EDM:
        return replace(teacher, scheduler={**teacher.scheduler, **asdict(noise)})
    scheduler = make_scheduler(teacher.scheduler, teacher.scheduler_class)
    process = {name: scheduler.config[name] for name in PROCESS}
    if process["trained_betas"] is None and process["beta_schedule"] not in LCM_SCHEDULES:
        process["trained_betas"] = scheduler.betas.tolist()
    steps = process["num_train_timesteps"]
    made = {
        "_class_name": LCM,
        **process,
        "prediction_type": scheduler.config.prediction_type,
        "timestep_scaling": SHARP if continuous else 10.0,
        # So that the first of its timesteps is the last of training.
        "original_inference_steps": LCM_STEPS if steps % LCM_STEPS == 0 else steps,
        "clip_sample": False,
    }
    return replace(teacher, scheduler=made)


def sampler_levels(config: DiffusersConfig, steps: int) -> Tensor | None:
    """The levels that a scheduler of students visits, float64 [steps]; None for another scheduler.

    Raises:
        UsageError: it cannot take this number of steps.
    """
    if config.scheduler_class not in (LCM, CM):
        return None
    scheduler = make_scheduler(config.scheduler, config.scheduler_class)
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UsageError(f"--steps {steps}: {first_line(error)}") from None
    if config.scheduler_class == CM:
        times: Tensor = scheduler.timesteps
        return (times.double() / CM_TIME).exp()
    return log_levels(scheduler.alphas_cumprod)[scheduler.timesteps].exp()


def is_discrete(config: DiffusersConfig) -> bool:
    """Whether it is of a discrete process, which begins at x_T ~ N(0, I) and ends at data."""
    return config.scheduler_class not in (EDM, CM)


def save_student(directory: Path, record: Mapping[str, Any], network: nn.Module) -> None:
    """Write a student into a directory that exists.

    Args:
        record: `asdict` of a `ModelConfig` whose network is a `DiffusersConfig`, and `training`.
    """
    config = DiffusersConfig(**record["network"])
    _write_json(directory / RECORD, record)
    (directory / "unet").mkdir()
    state = network.get_submodule("unet").state_dict()
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, directory / "unet" / WEIGHTS, metadata={"format": "pt"})
    _write_json(directory / "unet" / CONFIG, config.unet)
    parts = _copied_parts(config, directory)
    if config.scheduler_class != LCM:
        return
    (directory / "scheduler").mkdir()
    _write_json(directory / "scheduler" / SCHEDULER, config.scheduler)
    kind = "LDMPipeline" if parts else "DDPMPipeline"
    index = {
        "_class_name": "LatentConsistencyModelPipeline" if config.text else kind,
        "scheduler": ["diffusers", LCM],
        "unet": ["diffusers", config.unet["_class_name"]],
        **parts,
    }
    _write_json(directory / INDEX, index)


def _copied_parts(config: DiffusersConfig, directory: Path) -> dict[str, Any]:
    """Copy VAE and text encoder into a student; what its model_index.json says of them."""
    if not config.autoencoder:
        return {}
    name = "vae" if config.text else "vqvae"
    source, copy = Path(config.autoencoder), directory / name
    copy.mkdir()
    for file in (source / CONFIG, *part_files(source)):
        shutil.copy(file, copy)
    parts = {name: ["diffusers", read_json(copy / CONFIG)["_class_name"]]}
    if not config.text:
        return parts
    return {**parts, **copy_text_parts(Path(config.text), directory)}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _clip(scheduler: Mapping[str, Any]) -> float | None:
    clips = CLIPS.get(scheduler["_class_name"])
    if clips is None or not scheduler.get("clip_sample", clips):
        return None
    return float(scheduler.get("clip_sample_range", 1.0))


def _sigma_data(scheduler: Any) -> float:
    return float(scheduler.config.get("sigma_data", VARIANCE_PRESERVING))


def _noise(scheduler: Any) -> NoiseRange:
    if type(scheduler).__name__ in (EDM, CM):
        config = scheduler.config
        return NoiseRange(float(config.sigma_min), float(config.sigma_max), float(config.rho))
    sigmas = log_levels(scheduler.alphas_cumprod).exp()
    return NoiseRange(float(sigmas[0]), float(sigmas[-1]))
