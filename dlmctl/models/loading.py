"""From a name to a policy: hub name, directory, checkpoint of a run, adapter, or `builtin:NAME`.

Weights are read from safetensors, and no code of a checkpoint is executed.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor

from dlmctl.models.adapters import adapter_base, is_base, merged, trained_on, with_adapter
from dlmctl.models.allocator import keep_freed_memory
from dlmctl.models.architecture import FAULTS, Architecture, architecture
from dlmctl.models.policy import Policy
from dlmctl.models.quantization import on_disk, quantization_of, quantized
from dlmctl.models.sight import check_class
from dlmctl.models.special_tokens import load_tokenizer, special_tokens
from dlmctl.models.vision import Vision, vision_of
from dlmctl.models.weights import align, first_misfit, read_weights, weight_files, weights_hash
from dlmctl.records.errors import (
    DataError,
    MissingInputError,
    TryAgainError,
    UnavailableError,
    UsageError,
    reason_of,
)
from dlmctl.records.files import read_json
from dlmctl.settings.compute import Quantization
from dlmctl.settings.models import Prompting, Reading, split_name

ASSETS = Path(__file__).parent.parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]

NOT_WEIGHTS = ("rotary_emb.inv_freq", ".position_ids", ".masked_bias")
"""Endings of names of tensors that older versions of transformers saved, and that are computed."""


def load_policy(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    prompting: Prompting | None = None,
    quantize: Quantization | None = None,
) -> Policy:
    """Load a model for inference.

    Args:
        name: `builtin:NAME`, a directory (a checkpoint, a run with `latest`, a peft adapter), or a
            hub name, with `@REVISION` if wanted; settings of `Reading` may follow, as in
            `NAME,family=a2d`.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.
        prompting: how it is prompted; None: by its chat template, with nothing added.
        quantize: format of its linear layers, or of those below its adapter; None: as `dtype` says.

    Raises:
        MissingInputError: there is no such model, or it lacks a file.
        DataError: its files cannot be used.
        UnavailableError: the device or a package is missing.
        UsageError: the model cannot be quantized.
        TryAgainError: the hub does not answer.
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    directory = model_directory(name)
    if (directory / "adapter_config.json").exists():
        return _load_adapter(name, directory, device, dtype, prompting or Prompting(), quantize)
    if quantize is not None:
        return load_base(name, device, dtype, prompting, quantize)

    config = directory / "config.json"
    if not config.exists():
        raise MissingInputError(f"{directory} has no config.json: it is not a model")
    arch = architecture(read_json(config), str(config), split_name(name)[1])
    files = weight_files(directory)
    model = _build(arch, files, precision, directory).to(where).eval()
    align(model)
    tokenizer = load_tokenizer(directory, arch)
    policy = policy_of(name, arch, model, tokenizer, weights_hash(files), directory)
    vision = _load_vision(directory, arch, tokenizer) if arch.family.takes_images else None
    policy = dataclasses.replace(policy, prompting=prompting or Prompting(), vision=vision)
    check_class(policy)
    return policy


def load_base(
    name: str,
    device: str,
    dtype: str,
    prompting: Prompting | None = None,
    quantize: Quantization | None = None,
) -> Policy:
    """A model with its adapter, if it has one, merged into its weights, which are then quantized.

    Arguments and errors are those of `load_policy`.
    """
    if quantize is None:
        return merged(load_policy(name, device, dtype, prompting))
    where = resolve_device(device)
    precision = str(resolve_dtype(dtype, where)).removeprefix("torch.")
    return quantized(merged(load_policy(name, "cpu", precision, prompting)), quantize, where)


def resolve_device(device: str) -> torch.device:
    """The device of a `--device` option; raises UnavailableError and UsageError."""
    keep_freed_memory()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device} is not a device: auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; 'dlmctl doctor' says why"
        )
    if chosen.type == "cuda":
        # cuDNN plans its attention anew for each shape, and a sampler's passes have hundreds.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of a `--dtype` option; raises UsageError."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def fixed_name(name: str) -> str:
    """A name that means the same in any directory and later: for a run, its present checkpoint."""
    path, reading = split_name(name)
    if not Path(path).expanduser().is_dir():
        return name
    return reading.name(str(model_directory(path).resolve()))


def run_of(name: str) -> tuple[Path, Reading]:
    """The run that a fixed name is a checkpoint of; if it is of none, the path itself."""
    plain, reading = split_name(name)
    path = Path(plain)
    of_run = path.is_absolute() and (path.parent / "latest").is_symlink()
    return path.parent if of_run else path, reading


def model_directory(name: str, files: list[str] = HUB_FILES) -> Path:
    """The directory that contains a model; for a hub name, these files are downloaded."""
    name, _ = split_name(name)
    if name.startswith("builtin:"):
        directory = ASSETS / name.removeprefix("builtin:")
        if not directory.is_dir():
            names = ", ".join(sorted(p.name for p in ASSETS.iterdir() if p.is_dir()))
            raise MissingInputError(f"there is no model {name}; there are: {names}")
        return directory
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike path.is_dir(), accepts names that are too long
        latest = path / "latest"
        return latest.resolve() if latest.exists() else path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise MissingInputError(f"no model at {name}: it is neither a directory nor a hub name")
    return _download(name, files)


def config_file(name: str, files: list[str] = HUB_FILES) -> tuple[Path, Reading]:
    """The config.json of a model, or of an adapter's base model, and the settings after its name.

    Raises:
        MissingInputError: there is no config.json.
    """
    directory = model_directory(name, files)
    if (directory / "adapter_config.json").exists():
        return config_file(adapter_base(directory), files)
    if not (directory / "config.json").exists():
        raise MissingInputError(f"{directory} has no config.json: it is not a model")
    return directory / "config.json", split_name(name)[1]


def base_directory(name: str) -> Path:
    """The directory with the weights that all adapters of a model are based on."""
    directory = model_directory(name)
    while (directory / "adapter_config.json").exists():
        directory = model_directory(adapter_base(directory))
    return directory


def _download(name: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=files))
    except GatedRepoError:
        raise MissingInputError(
            f"{name} is gated: accept its terms on the hub, then  hf auth login"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise MissingInputError(f"no model {name}: no such directory, nor on the hub") from None
    except (OSError, ValueError) as error:
        reason = reason_of(error)
        raise TryAgainError(
            f"{name} is not a directory here, and the hub does not answer ({reason})"
        ) from None


def _build(arch: Architecture, files: list[Path], dtype: torch.dtype, directory: Path) -> Any:
    """The model with its weights, of which none may be missing and none may be left over."""
    tensors = read_weights(files, arch.rename)
    # A concrete class, so that from_pretrained takes tensors instead of a path.
    factory = arch.model_class(str(directory))
    try:
        model, report = factory.from_pretrained(
            None,
            config=arch.config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation=arch.kernel(factory),
        )
    except FAULTS as error:
        reason = _misfit(factory, arch, tensors) or str(error).strip().split("\n")[-1]
        raise DataError(f"{directory}: the weights do not fit config.json ({reason})") from None
    missing = sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", [])))
    if missing:
        raise DataError(
            f"{directory}: {len(missing)} weights are missing or misshapen, first {missing[0]}"
        )
    left_over = [
        name
        for name in sorted(report["unexpected_keys"])
        if not name.endswith(NOT_WEIGHTS) and not name.startswith(arch.family.ignored_weights)
    ]
    if left_over:
        raise DataError(
            f"{directory}: {len(left_over)} weights belong to no part of a {type(model).__name__}, "
            f"first {left_over[0]}: config.json does not describe this model"
        )
    return model


def _misfit(factory: Any, arch: Architecture, tensors: dict[str, torch.Tensor]) -> str | None:
    """Which weight of a checkpoint does not fit, if a model can be built at all."""
    try:
        with torch.device("meta"):
            return first_misfit(factory._from_config(arch.config), tensors)
    except FAULTS:
        return None


def _load_vision(directory: Path, arch: Architecture, tokenizer: Any) -> Vision:
    """How the model takes images; the processor is torchvision's if that is installed."""
    try:
        processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of many kinds
        reason = reason_of(error)
        raise DataError(f"{directory}: its image processor cannot be loaded ({reason})") from None
    return vision_of(arch.family, arch.config, tokenizer, processor)


def policy_of(
    name: str, arch: Architecture, model: Any, tokenizer: Any, revision: str, directory: Path
) -> Policy:
    """The policy of a checkpoint's parts; raises DataError for special tokens that do not fit."""
    return Policy(
        model=model,
        tokenizer=tokenizer,
        family=arch.family.name,
        shift=arch.shift,
        vocab_size=arch.config.get_text_config().vocab_size,
        name=name,
        revision=revision,
        sampling=arch.sampling,
        blocks=arch.blocks,
        latent_masks=arch.latent_masks,
        **special_tokens(name, arch, tokenizer, directory)._asdict(),
    )


def checkpoint_revision(directory: Path, base_revision: str) -> str:
    """The revision that `load_policy` gives a checkpoint; `base_revision` is for adapters."""
    adapter = directory / "adapter_model.safetensors"
    if adapter.exists():
        return f"{base_revision}.{weights_hash([adapter])}"
    return weights_hash(weight_files(directory))


def reload_policy(policy: Policy, name: str, device: str, dtype: str) -> Policy:
    """The policy with the weights of a newer checkpoint of the same run.

    They are copied into the existing tensors, so that nothing is allocated or built again. The
    first adapter of a run is put on the model in memory, which is its base from then on. A
    checkpoint with other weights, shapes or base is loaded afresh, and so are quantized weights.
    """
    directory = model_directory(name)
    adapter = directory / "adapter_model.safetensors"
    present, quantize = policy.model.state_dict(), policy.quantized
    adapted = hasattr(policy.model, "peft_config")
    if adapter.exists() and not adapted and is_base(policy, directory):
        return _with_adapter(policy, name, directory)
    if adapter.exists() != adapted or (quantize and not adapted):
        return load_policy(name, device, dtype, policy.prompting, quantize)
    files = [adapter] if adapter.exists() else weight_files(directory)
    tensors = read_weights(files, str)
    if adapter.exists():
        # On disk peft leaves out the name of the adapter.
        parts = (key.rpartition(".") for key in tensors)
        tensors = {
            f"{a}.default.{b}": t for (a, _, b), t in zip(parts, tensors.values(), strict=True)
        }
        wanted = {key for key in present if "lora_" in key}
        base, below = policy.revision.rpartition(".")[0], trained_on(directory)
        if below is None or on_disk(below) != on_disk(base):
            # An adapter over a model that has one itself does not take the place of that.
            return load_policy(name, device, dtype, policy.prompting, quantize)
    else:
        tied = getattr(policy.model, "all_tied_weights_keys", None) or {}
        present = _as_on_disk(policy.model, present)
        wanted, base = present.keys() - set(tied), policy.revision
    if not wanted <= tensors.keys() <= present.keys() or any(
        present[key].shape != tensor.shape for key, tensor in tensors.items()
    ):
        return load_policy(name, device, dtype, policy.prompting, quantize)
    with torch.no_grad():
        for key, tensor in tensors.items():
            present[key].copy_(tensor)
    return dataclasses.replace(policy, name=name, revision=checkpoint_revision(directory, base))


def _as_on_disk(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model by their names in its checkpoints, if those differ in transformers.

    Nothing is renamed if a checkpoint contains some of them joined or split, since the result would
    be copies and not the model's own tensors.
    """
    from transformers.core_model_loading import revert_weight_conversion

    renamed: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    same = {id(tensor) for tensor in tensors.values()}
    return renamed if all(id(tensor) in same for tensor in renamed.values()) else tensors


def _load_adapter(
    name: str,
    directory: Path,
    device: str,
    dtype: str,
    prompting: Prompting,
    quantize: Quantization | None,
) -> Policy:
    """A base model with the peft adapter in `directory`.

    Raises:
        DataError: the base model no longer has the weights that the adapter was trained on here.
    """
    base_name = adapter_base(directory)
    base = load_base(base_name, device, dtype, prompting, quantize)
    below = trained_on(directory)
    if below is not None and on_disk(below) != on_disk(base.revision):
        raise DataError(
            f"{base_name}, the model that it was trained on, has other weights now; restore them, "
            "or train again",
            str(directory),
        )
    return _with_adapter(base, name, directory)


def _with_adapter(base: Policy, name: str, directory: Path) -> Policy:
    """The same of a base model in memory, which becomes a part of it."""
    below = quantization_of(trained_on(directory) or "")
    if below not in (None, base.quantized):
        print(
            f"dlmctl: {directory} was trained over weights quantized to {below}, and is used over "
            "those that they were quantized from",
            file=sys.stderr,
        )
    policy = with_adapter(base, name, directory)
    return dataclasses.replace(policy, revision=checkpoint_revision(directory, base.revision))
