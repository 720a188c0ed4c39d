"""Directories of diffusers: what is in them, and what is refused.

    PIPELINE/model_index.json, unet/, scheduler/, and vae/ or vqvae/ for a model of latents
    UNET/config.json, diffusion_pytorch_model.safetensors, scheduler_config.json; or the scheduler
        of the pipeline that it is in, ../scheduler/
    STUDENT/unet/, dlmctl.json: a student without a scheduler of diffusers (see diffusers_models)

Classes are taken from the lists below, never from code beside the weights, and weights are
safetensors.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dlmctl.models.weights import weight_files
from dlmctl.records.errors import DataError, MissingInputError, UnavailableError, missing_package
from dlmctl.records.files import read_json

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
RECORD = "dlmctl.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET = "UNet2DModel"
AUTOENCODERS = ("AutoencoderKL", "VQModel")
DISCRETE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
)
"""Schedulers of a discrete process: they differ in how they sample, which is not taken over."""
EDM, LCM, CM = "EDMEulerScheduler", "LCMScheduler", "CMStochasticIterativeScheduler"
SCHEDULERS = (*DISCRETE, EDM, LCM, CM)
TEXT_PARTS = {
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
UNREADABLE = (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, OSError)
"""What diffusers raises for a file that is not what it should be."""


class Parts(NamedTuple):
    """Where the parts of a model are."""

    unet: Path
    scheduler: Path | None
    """Its configuration; None if dlmctl.json has it."""
    autoencoder: Path | None = None


def is_diffusers(directory: Path) -> bool:
    """Whether a directory is one of those above."""
    if any((directory / name).is_file() for name in (INDEX, f"unet/{CONFIG}")):
        return True
    config = directory / CONFIG
    return config.is_file() and "_class_name" in read_json(config)


def parts_of(directory: Path) -> Parts:
    """The parts of a directory.

    Raises:
        MissingInputError: one of them is not there.
        DataError: it has other parts than an unconditional model has.
    """
    if (directory / INDEX).is_file():
        return _of_pipeline(directory)
    if (directory / "unet").is_dir():
        if not (directory / RECORD).is_file():
            raise MissingInputError(
                f"{directory} has no {INDEX}, and no {RECORD} that says how to evaluate its U-Net"
            )
        autoencoder = next((p for n in ("vae", "vqvae") if (p := directory / n).is_dir()), None)
        return Parts(directory / "unet", None, autoencoder)
    if any((directory.parent / name).is_dir() for name in ("vae", "vqvae", "text_encoder")):
        raise DataError(
            "a U-Net of a pipeline with further parts: name the directory of the pipeline",
            str(directory),
        )
    for place in (directory, directory.parent / "scheduler"):
        if (place / SCHEDULER).is_file():
            return Parts(directory, place / SCHEDULER)
    raise MissingInputError(
        f"{directory} is a U-Net alone, which does not say what noise it was trained on: put the "
        f"{SCHEDULER} of its pipeline into it, or name the pipeline"
    )


def _of_pipeline(directory: Path) -> Parts:
    index = directory / INDEX
    parts = {
        name: value
        for name, value in read_json(index).items()
        if isinstance(value, list) and value != [None, None]
    }
    text = [name for name in parts if name.startswith(("text_encoder", "tokenizer", "prior"))]
    if text:
        raise DataError(
            f"a model of images of a text, with {text[0]}: 'distill lcm' distils it, and 'distill "
            "sample' needs --prompts",
            str(index),
        )
    autoencoders = [name for name in ("vae", "vqvae") if name in parts]
    known = ["unet", "scheduler", *autoencoders[:1]]
    other = [name for name in parts if name not in known]
    if other:
        raise DataError(
            f"a pipeline with the part {other[0]}; those with a unet, a scheduler and at most one "
            "vae are handled",
            str(index),
        )
    for name in known:
        if name not in parts or not (directory / name).is_dir():
            raise MissingInputError(f"{directory} has no part {name}")
        if parts[name][0] != "diffusers":
            raise DataError(
                f"the part {name} is a class of '{parts[name][0]!s:.40}', and only those of "
                "diffusers itself are loaded",
                str(index),
            )
    autoencoder = directory / autoencoders[0] if autoencoders else None
    return Parts(directory / "unet", directory / "scheduler" / SCHEDULER, autoencoder)


def unet_config(path: Path) -> dict[str, Any]:
    """The configuration of a U-Net, as it is used.

    Raises:
        MissingInputError: it is not there.
        DataError: it belongs to a model that is not handled.
    """
    config = {k: v for k, v in read_json(path).items() if k != "_name_or_path"}
    reason = _unet_complaint(config)
    if reason:
        raise DataError(reason, str(path))
    return config


def _unet_complaint(config: Mapping[str, Any]) -> str | None:
    kind = config.get("_class_name")
    if kind != UNET:
        text = ", which takes a text or another condition" if "Condition" in str(kind) else ""
        return f"a {kind!s:.60}{text}; only the unconditional {UNET} is handled"
    if config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None:
        return "a class-conditional U-Net; only unconditional ones are handled"
    channels, out = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != out:
        learned = isinstance(channels, int) and out == 2 * channels
        why = ": the variance is learned too, which is not handled" if learned else ""
        return f"the U-Net has {channels} channels in and {out} out{why}"
    embedding = config.get("time_embedding_type", "positional")
    if embedding != "positional":
        return f"the U-Net has a {embedding} embedding of time; only the positional one is handled"
    if "quantization_config" in config:
        return "quantized weights are not handled"
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in (*sides, channels)):
        return "it says no sample_size, the height and width of a sample: add it"
    return None


def scheduler_config(path: Path) -> dict[str, Any]:
    """The configuration of a scheduler; raises as `unet_config`."""
    config = {k: v for k, v in read_json(path).items() if k != "_name_or_path"}
    make_scheduler(config, str(path))
    return config


def make_scheduler(config: Mapping[str, Any], where: str) -> Any:
    """The scheduler of a configuration.

    Raises:
        DataError: it is not one that is handled, or is set to what is not.
        UnavailableError: diffusers is not installed.
    """
    name = config.get("_class_name")
    if name not in SCHEDULERS:
        raise DataError(
            f"the scheduler {name!s:.60} is not handled; there are: {', '.join(SCHEDULERS)}", where
        )
    try:
        scheduler = diffusers_class(name).from_config(dict(config))
        reason = _scheduler_complaint(scheduler)
    except UNREADABLE as error:
        raise DataError(f"not the configuration of a {name} ({first_line(error)})", where) from None
    if reason:
        raise DataError(reason, where)
    return scheduler


def _scheduler_complaint(scheduler: Any) -> str | None:
    config = scheduler.config
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        return f"the prediction_type '{prediction!s:.40}' is not handled"
    if config.get("thresholding"):
        return "dynamic thresholding of samples is not handled: it makes them depend on their size"
    if str(config.get("variance_type")).startswith("learned"):
        return "a learned variance is not handled"
    if config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous":
        return "only the discrete timesteps of training are handled for this scheduler"
    if type(scheduler).__name__ in (EDM, CM):
        levels = (config["sigma_min"], config["sigma_max"], config["sigma_data"], config["rho"])
        good = all(0 < float(level) < 1e6 for level in levels) and levels[0] < levels[1]
        return None if good else "its levels of noise are not a range of positive numbers"
    kept = scheduler.alphas_cumprod
    if config.get("rescale_betas_zero_snr") or not float(kept[-1]) > 0:
        return "its last timestep is noise alone (rescale_betas_zero_snr), which has no level sigma"
    falls = len(kept) > 1 and bool((kept[1:] < kept[:-1]).all()) and float(kept[0]) < 1
    return None if falls else "its timesteps are not of rising noise"


def load_part(directory: Path, name: str) -> Any:
    """A network of diffusers with its weights, in float32.

    Args:
        name: the class.

    Raises:
        MissingInputError: there are no weights.
        DataError: they are not those of the configuration, or not safetensors.
    """
    import torch

    files = part_files(directory)
    try:
        part, about = diffusers_class(name).from_pretrained(
            str(directory),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
        wrong = [key for kind in about.values() for key in kind]
    except UNREADABLE as error:
        raise DataError(
            f"cannot be loaded as a {name}: {first_line(error)}", str(directory)
        ) from None
    if wrong:
        what = f"{len(wrong)} of other names or shapes, first {wrong[0]!s:.80}"
        raise DataError(f"not the weights of its {CONFIG}: {what}", str(files[0]))
    return part.eval().requires_grad_(False)


def part_files(directory: Path) -> list[Path]:
    """The safetensors files of a part; raises as `load_part`."""
    files = sorted(directory.glob("diffusion_pytorch_model*.safetensors"))
    variants = [file for file in files if file.name.count(".") > 1]
    files = [file for file in files if file not in variants]
    if files:
        return files
    if variants:
        raise DataError(
            f"only the variant {variants[0].name} is there: save the model without a variant",
            str(directory),
        )
    pickled = [
        p for end in ("bin", "pt", "pth", "ckpt") for p in sorted(directory.glob(f"*.{end}"))
    ]
    if pickled:
        raise DataError(
            f"{pickled[0].name} is pickled, which can run code and is not read: convert it with "
            "save_pretrained on a machine you trust",
            str(directory),
        )
    raise MissingInputError(f"{directory} has no {WEIGHTS}")


def copy_text_parts(source: Path, directory: Path) -> dict[str, list[str]]:
    """Copy text encoder and tokenizer of a pipeline; what model_index.json says of them."""
    encoder, tokenizer = source / "text_encoder", source / "tokenizer"
    named = [*sorted(tokenizer.glob("*.json")), *sorted(tokenizer.glob("*.txt"))]
    files = {"text_encoder": [encoder / CONFIG, *weight_files(encoder)], "tokenizer": named}
    for name, listed in files.items():
        (directory / name).mkdir()
        for file in listed:
            shutil.copy(file, directory / name)
    return {name: list(kind) for name, kind in TEXT_PARTS.items()}


def diffusers_class(name: str) -> Any:
    """A class of diffusers; raises UnavailableError."""
    try:
        return getattr(importlib.import_module("diffusers"), name)
    except ImportError as error:
        if error.name == "diffusers":
            raise missing_package("diffusers", "diffusers", "a directory of diffusers") from None
        raise UnavailableError(
            f"diffusers cannot be imported ({first_line(error)}): "
            "run  pip install 'dlmctl[diffusers]'"
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, short, on one line; of a list, its first item too."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    return (said or type(error).__name__)[:200]
