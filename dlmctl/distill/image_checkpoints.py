"""Models in directories: `config.json`, and the weights of the network in `model.safetensors`.

The configuration has the kind (`edm`: a denoiser; `consistency`: a student), the noise range and
the sizes of the network; `training` records what it was trained on, and how. Directories of
diffusers are models too; `diffusers_models` says which.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dlmctl.distill import diffusers_models
from dlmctl.distill.consistency_model import ConsistencyModel
from dlmctl.distill.diffusers_directories import RECORD, is_diffusers
from dlmctl.distill.diffusers_models import Autoencoder
from dlmctl.distill.diffusers_networks import VARIANCE_PRESERVING, DiffusersConfig
from dlmctl.distill.edm import Denoiser, EdmDenoiser, OptimalDenoiser
from dlmctl.distill.image_networks import NetworkConfig, make_network
from dlmctl.distill.image_sets import read_images
from dlmctl.distill.text_pipelines import is_text_pipeline, load_text_pipeline
from dlmctl.models.weights import read_weights, weights_hash
from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.files import read_json
from dlmctl.settings.images import ImageReading, NoiseRange
from dlmctl.train.run_directory import checkpoint_name, checkpoint_numbers

ModelKind = Literal["edm", "consistency", "optimal"]
OPTIMAL = "optimal:"
"""Prefix of a source of images: the closed-form denoiser of that set."""
CONFIG, WEIGHTS = "config.json", "model.safetensors"
UNREADABLE = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)
"""What comes of a configuration that is not one of ours."""


@dataclass(frozen=True)
class ModelConfig:
    """What a network is part of."""

    kind: Literal["edm", "consistency"]
    network: NetworkConfig | DiffusersConfig
    sigma_data: float = 0.5
    noise: NoiseRange = field(default_factory=NoiseRange)
    identity_at: float | None = None
    """Of a student: the level at which it is the identity; None is the smallest."""


@dataclass(frozen=True)
class ImageModel:
    """A denoiser or a consistency model, ready to evaluate."""

    name: str
    kind: ModelKind
    function: Denoiser
    shape: tuple[int, ...]
    """Shape of one image or vector."""
    noise: NoiseRange
    device: torch.device
    config: ModelConfig | None = None
    """None for the closed form."""
    network: nn.Module | None = None
    training: Mapping[str, Any] | None = None
    """How it was trained, and the `step` of its checkpoint."""
    revision: str = ""
    """Hash of the weights."""
    autoencoder: Autoencoder | None = None
    """Of a model of latents."""
    conditioned: Callable[[range], Denoiser] | None = None
    """Of a model of texts: `function` for the texts of these samples."""

    @property
    def discrete(self) -> bool:
        """Whether it is of a discrete process of diffusers."""
        network = self.config.network if self.config else None
        return isinstance(network, DiffusersConfig) and diffusers_models.is_discrete(network)


def wrap(config: ModelConfig, network: nn.Module) -> nn.Module:
    """The model around a network, a `Denoiser`."""
    if config.kind == "edm":
        if isinstance(config.network, DiffusersConfig):
            return diffusers_models.denoiser(config.network, network, config.sigma_data)
        return EdmDenoiser(network, config.sigma_data)
    return student(config, network)


def student(config: ModelConfig, network: nn.Module) -> ConsistencyModel:
    """The consistency model around a network."""
    least = config.noise.sigma_min
    eps = least if config.identity_at is None else config.identity_at
    if isinstance(config.network, DiffusersConfig):
        return diffusers_models.consistency_model(
            config.network, network, config.sigma_data, eps, least
        )
    return ConsistencyModel(network, config.sigma_data, eps)


def save_model(
    directory: Path, config: ModelConfig, network: nn.Module, training: Mapping[str, Any]
) -> None:
    """Write a model into a directory that exists."""
    about = {**asdict(config), "training": dict(training)}
    if isinstance(config.network, DiffusersConfig):
        diffusers_models.save_student(directory, about, network)
        return
    (directory / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    state = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def load_model(
    name: str,
    device: torch.device | str = "cpu",
    at: int | None = None,
    reading: ImageReading = ImageReading(),
) -> ImageModel:
    """A model by the name of its run or checkpoint, or `optimal:IMAGES`.

    Args:
        at: the step of a run's checkpoint; None is the newest.
        reading: of the images of a closed form.

    Raises:
        MissingInputError: there is no such directory or checkpoint.
        DataError: its configuration or weights are damaged.
        UsageError: the closed form has no checkpoints.
    """
    device = torch.device(device)
    if name.startswith(OPTIMAL):
        if at is not None:
            raise UsageError(f"{name} is a closed form and has no checkpoints")
        images = read_images(name[len(OPTIMAL) :], reading)
        exact = OptimalDenoiser(images).to(device)
        return ImageModel(name, "optimal", exact, tuple(images.shape[1:]), NoiseRange(), device)
    directory = find_checkpoint(Path(name), at)
    if not _is_own(directory):
        return _load_diffusers(directory, device)
    about = read_json(directory / CONFIG)
    config = _config(about, directory / CONFIG)
    tensors = read_weights([directory / WEIGHTS], lambda tensor: tensor)
    assert isinstance(config.network, NetworkConfig)
    network = _network(config.network, tensors, directory)
    network.to(device).eval().requires_grad_(False)
    return ImageModel(
        str(directory),
        config.kind,
        wrap(config, network),
        config.network.shape,
        config.noise,
        device,
        config,
        network,
        about.get("training"),
        weights_hash([directory / WEIGHTS]),
    )


def _load_diffusers(directory: Path, device: torch.device) -> ImageModel:
    loaded = diffusers_models.load_directory(directory)
    config = ModelConfig(
        loaded.kind, loaded.config, loaded.sigma_data, loaded.noise, loaded.identity_at
    )
    network = loaded.network.to(device).eval().requires_grad_(False)
    return ImageModel(
        str(directory),
        config.kind,
        wrap(config, network),
        loaded.config.shape,
        config.noise,
        device,
        config,
        network,
        loaded.training,
        loaded.revision,
        diffusers_models.load_autoencoder(loaded.config, device),
    )


def load_text_model(
    name: str,
    texts: Sequence[str],
    guidance: float,
    device: torch.device | str = "cpu",
    at: int | None = None,
) -> ImageModel:
    """A text-to-image model by the name of its directory or run; raises as `load_model`.

    Args:
        texts: at least one; sample i is of text i, and of the first again after the last.
        guidance: the scale, as diffusers counts it.
    """
    directory, device = find_checkpoint(Path(name), at), torch.device(device)
    if not is_text_pipeline(directory):
        raise UsageError(f"--prompts is for models of texts, and {name} has no text encoder")
    model = load_text_pipeline(directory, device)
    unet = model.process.unet

    def conditioned(samples: range) -> Denoiser:
        states = model.encode([texts[n % len(texts)] for n in samples])
        strength = torch.full((len(samples),), guidance - 1, device=device)
        if model.is_student:
            return model.process.student(unet, states, strength, model.scaling)
        return model.process.denoiser(states, strength)

    kind: Literal["edm", "consistency"] = "consistency" if model.is_student else "edm"
    config = ModelConfig(kind, model.config, VARIANCE_PRESERVING, model.noise)
    return ImageModel(
        str(directory),
        config.kind,
        conditioned(range(1)),
        model.config.shape,
        config.noise,
        device,
        config,
        unet,
        model.training,
        model.revision,
        model.autoencoder,
        conditioned,
    )


def saved_record(directory: Path) -> dict[str, Any]:
    """The configuration of a checkpoint, as `save_model` wrote it; raises as `load_model`."""
    own = directory / CONFIG
    return read_json(own if own.exists() else directory / RECORD)


def _network(config: NetworkConfig, tensors: Mapping[str, Tensor], directory: Path) -> nn.Module:
    """The network with its weights; nothing is allocated that the file does not contain.

    Raises:
        DataError: the configuration belongs to another network.
    """
    try:
        if config.blocks * max(1, len(config.multipliers)) > len(tensors):
            raise ValueError(f"{len(tensors)} tensors are fewer than its blocks")
        with torch.device("meta"):
            shapes = {k: v.shape for k, v in make_network(config).state_dict().items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            wrong = {k for k, v in tensors.items() if shapes.get(k) != v.shape}
            wrong |= shapes.keys() - tensors.keys()
            raise ValueError(f"{len(wrong)} of other names or shapes, first {min(wrong)}")
        network = make_network(config)
        network.load_state_dict(dict(tensors), strict=True)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[-1].strip()[:200]
        raise DataError(f"not the weights of its {CONFIG}: {reason}", str(directory)) from None
    return network


def find_checkpoint(directory: Path, at: int | None = None) -> Path:
    """The directory of a model: itself, a run's newest, or a run's at a step."""
    if at is not None:
        chosen = directory / checkpoint_name(at)
        if not _is_model(chosen):
            steps = checkpoint_steps(directory)
            there = ", ".join(map(str, steps)) if steps else "none"
            raise MissingInputError(f"{directory} has no checkpoint at {at}; there are: {there}")
        return chosen
    link = directory / "latest"
    newest = directory / link.readlink() if link.is_symlink() else link
    for chosen in (newest, directory):
        if _is_model(chosen):
            return chosen
    raise MissingInputError(
        f"{directory} has no model: it needs {CONFIG} and {WEIGHTS}, a run's 'latest', or a "
        "pipeline of diffusers"
    )


def checkpoint_steps(run: Path) -> list[int]:
    """The steps that a run has checkpoints of, in order."""
    steps = checkpoint_numbers(run) if run.is_dir() else []
    return sorted(n for n in steps if _is_model(run / checkpoint_name(n)))


def _is_model(directory: Path) -> bool:
    return _is_own(directory) or is_diffusers(directory)


def _is_own(directory: Path) -> bool:
    return (directory / CONFIG).exists() and (directory / WEIGHTS).exists()


def _config(about: Mapping[str, Any], path: Path) -> ModelConfig:
    try:
        network: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value
            for key, value in about["network"].items()
        }
        if about["kind"] not in ("edm", "consistency"):
            raise ValueError(f"kind is {about['kind']!r}")
        sigma, noise = float(about["sigma_data"]), NoiseRange(**about["noise"])
        if not all(0 < float(level) < math.inf for level in (sigma, *astuple(noise))):
            raise ValueError("levels of noise are positive numbers")
        still = about.get("identity_at")
        if still is not None and not 0 <= float(still) <= noise.sigma_min:
            raise ValueError("a student is the identity at its smallest level or below")
        return ModelConfig(about["kind"], NetworkConfig(**network), sigma, noise, still)
    except (*UNREADABLE, AttributeError, UsageError) as error:
        raise DataError(f"not the configuration of a model ({error})", str(path)) from None
