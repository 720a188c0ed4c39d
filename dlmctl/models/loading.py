"""From a name to a policy: hub name, directory, checkpoint of a run, adapter, or `builtin:NAME`.

Weights are read from safetensors and nothing that a checkpoint brings is executed.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from dlmctl.models.adapters import adapter_base, merged, with_adapter
from dlmctl.models.allocator import keep_freed_memory
from dlmctl.models.families import FAULTS, HOW, TURN_ENDS, Architecture, architecture
from dlmctl.models.policy import LEFT_TO_RIGHT, Policy
from dlmctl.models.vision import Vision, vision_of
from dlmctl.models.weights import align, read_weights, weight_files, weights_hash
from dlmctl.records.errors import (
    DataError,
    MissingInputError,
    TryAgainError,
    UnavailableError,
    UsageError,
)
from dlmctl.records.files import read_json
from dlmctl.settings.models import Prompting, Reading, split_name

ASSETS = Path(__file__).parent.parent / "assets"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
HUB_FILES = [*TOKENIZER_FILES, "*.safetensors"]


NOT_WEIGHTS = ("rotary_emb.inv_freq", ".position_ids", ".masked_bias")
"""Ends of names of tensors that older versions of transformers saved and that are computed."""

OTHER_HEADS = ("cls.seq_relationship.", "bert.pooler.")
"""BERT's parts for guessing whether a sentence follows another."""


def load_policy(
    name: str, device: str = "auto", dtype: str = "auto", prompting: Prompting | None = None
) -> Policy:
    """Load a model for inference.

    Args:
        name: `builtin:NAME`, a directory (a checkpoint, a run with `latest`, a peft adapter), or a
            hub name, with `@REVISION` if wanted; behind it settings of `Reading`, as in
            `NAME,family=a2d`.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.
        prompting: how it is prompted; None: by its chat template, with nothing added.

    Raises:
        MissingInputError: the model is not there, or lacks a file.
        DataError: its files cannot be used.
        UnavailableError: the device or a package is missing.
        TryAgainError: the hub does not answer.
    """
    where = resolve_device(device)
    precision = resolve_dtype(dtype, where)
    directory = model_directory(name)
    if (directory / "adapter_config.json").exists():
        return _load_adapter(name, directory, device, dtype, prompting or Prompting())

    config_file = directory / "config.json"
    if not config_file.exists():
        raise MissingInputError(f"{directory} has no config.json: it is not a model")
    plan = architecture(read_json(config_file), str(config_file), split_name(name)[1])
    files = weight_files(directory)
    model = _build(plan, files, precision, directory).to(where).eval()
    align(model)
    tokenizer = load_tokenizer(directory, plan)
    policy = _policy(name, plan, model, tokenizer, weights_hash(files), directory)
    policy = dataclasses.replace(policy, prompting=prompting or Prompting())
    if plan.family == "vlm":
        policy = dataclasses.replace(policy, vision=_load_vision(directory, plan, tokenizer))
    return policy


def resolve_device(device: str) -> torch.device:
    """The device of a `--device` option; raises UnavailableError and UsageError."""
    keep_freed_memory()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UsageError(f"--device {device} is not a device: auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UnavailableError(
            f"--device {device}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices; 'dlmctl doctor' says why"
        )
    return chosen


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of a `--dtype` option; raises UsageError."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def fixed_name(name: str) -> str:
    """A name that means the same from everywhere and later on: of a run, its checkpoint of now."""
    path, reading = split_name(name)
    if not Path(path).expanduser().is_dir():
        return name
    return reading.name(str(model_directory(path).resolve()))


def run_of(name: str) -> tuple[Path, Reading]:
    """The run that a fixed name is a checkpoint of, later ones being of it too; else its path."""
    plain, reading = split_name(name)
    path = Path(plain)
    of_run = path.is_absolute() and (path.parent / "latest").is_symlink()
    return path.parent if of_run else path, reading


def model_directory(name: str, files: list[str] = HUB_FILES) -> Path:
    """The directory that holds a model; of a hub name, these files are downloaded."""
    name, _ = split_name(name)
    if name.startswith("builtin:"):
        directory = ASSETS / name.removeprefix("builtin:")
        if not directory.is_dir():
            there = sorted(p.name for p in ASSETS.iterdir() if p.is_dir())
            raise MissingInputError(f"there is no model {name}; there are: {', '.join(there)}")
        return directory
    path = Path(name).expanduser()
    if os.path.isdir(path):  # unlike path.is_dir(), also of a name that is too long
        latest = path / "latest"
        return latest.resolve() if latest.exists() else path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise MissingInputError(f"no model at {name}: it is no directory, and not a hub name")
    return _download(name, files)


def base_directory(name: str) -> Path:
    """The directory that holds the weights below all adapters of a model."""
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
        found = snapshot_download(repository, revision=revision or None, allow_patterns=files)
    except GatedRepoError:
        raise MissingInputError(
            f"{name} is gated: accept its terms on the hub, then  hf auth login"
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise MissingInputError(f"no model {name}: no such directory, nor on the hub") from None
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TryAgainError(
            f"{name} is no directory here, and the hub does not answer ({reason})"
        ) from None
    return Path(found)


def _build(plan: Architecture, files: list[Path], dtype: torch.dtype, directory: Path) -> Any:
    """The model with its weights; every weight must be there, and no other."""
    tensors = read_weights(files, plan.rename)
    # Of the class itself, so that from_pretrained takes tensors instead of a path.
    factory = model_class(plan, str(directory))
    try:
        model, report = factory.from_pretrained(
            None,
            config=plan.config,
            state_dict=tensors,
            dtype=dtype,
            output_loading_info=True,
            attn_implementation="sdpa",
        )
    except FAULTS as error:
        reason = str(error).strip().split("\n")[-1]
        raise DataError(f"{directory}: the weights do not fit config.json ({reason})") from None
    missing = sorted(report["missing_keys"]) + sorted(map(str, report.get("mismatched_keys", [])))
    if missing:
        raise DataError(
            f"{directory}: {len(missing)} weights are missing or misshapen, first {missing[0]}"
        )
    further = [
        name
        for name in sorted(report["unexpected_keys"])
        if not name.endswith(NOT_WEIGHTS) and not name.startswith(OTHER_HEADS)
    ]
    if further:
        raise DataError(
            f"{directory}: {len(further)} weights are of no part of a {type(model).__name__}, "
            f"first {further[0]}: config.json does not describe this model"
        )
    return model


def model_class(plan: Architecture, where: str) -> Any:
    """The class of transformers that a checkpoint is read as; raises DataError where none is."""
    kinds = {"mlm": AutoModelForMaskedLM, "vlm": AutoModelForImageTextToText}
    auto: Any = kinds.get(plan.family, AutoModelForCausalLM)
    try:
        return auto._model_mapping[type(plan.config)]
    except KeyError:
        raise DataError(
            f"{where}: a model of type '{plan.config.model_type}' is no language model"
        ) from None


def load_tokenizer(directory: Path, plan: Architecture) -> Any:
    """The tokenizer of a checkpoint; Dream's own class is Qwen2's under another name."""
    try:
        if (directory / "tokenizer.json").exists():
            return PreTrainedTokenizerFast.from_pretrained(directory)
        if plan.family == "dream":
            return Qwen2Tokenizer.from_pretrained(directory)
        # Left open, it asks on the terminal whether to run the checkpoint's code.
        return AutoTokenizer.from_pretrained(directory, config=plan.config, trust_remote_code=False)
    except Exception as error:  # tokenizers raises bare Exceptions
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{directory}: its tokenizer cannot be loaded ({reason})") from None


def _load_vision(directory: Path, plan: Architecture, tokenizer: Any) -> Vision:
    """How the model takes images; the processor is torchvision's where that is installed."""
    try:
        processor = AutoImageProcessor.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # of many kinds
        reason = str(error).strip().split("\n")[0]
        raise DataError(f"{directory}: its image processor cannot be loaded ({reason})") from None
    return vision_of(plan.config.model_type, plan.config, tokenizer, processor)


def _policy(
    name: str, plan: Architecture, model: Any, tokenizer: Any, revision: str, directory: Path
) -> Policy:
    config = plan.config
    mask_id = plan.mask_id if plan.mask_id is not None else tokenizer.mask_token_id
    vocab_size = config.get_text_config().vocab_size
    if plan.family in LEFT_TO_RIGHT:
        if plan.doubtful and mask_id is not None:
            raise DataError(
                f"{name} brings code of its own and its tokenizer has a mask token: if it is a "
                f"diffusion model, {HOW}; if not, write family=ar"
            )
        mask_id = None
    elif mask_id is None:
        raise DataError(
            f"{name} has no mask token: neither config.json (mask_token_id) nor its tokenizer; "
            "say which one it is with --mask-id"
        )
    elif mask_id >= vocab_size:
        raise DataError(f"the mask token {mask_id} of {name} is beyond its {vocab_size} tokens")
    ends = _end_ids(directory, plan)
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        eos_id = ends[0] if ends else None
    if eos_id is None and plan.family == "mlm":
        eos_id = tokenizer.sep_token_id
    pad_id = tokenizer.pad_token_id
    turn_ends = {tokenizer.get_vocab().get(token) for token in TURN_ENDS.get(plan.family, ())}
    return Policy(
        model=model,
        tokenizer=tokenizer,
        family=plan.family,
        mask_id=mask_id,
        eos_id=eos_id,
        pad_id=pad_id if pad_id is not None else (eos_id or 0),
        shift=plan.shift,
        vocab_size=vocab_size,
        name=name,
        revision=revision,
        sampling=plan.sampling,
        other_ends=frozenset(ends) - {eos_id},
        turn_ends=frozenset(turn_ends - {None}),
    )


def _end_ids(directory: Path, plan: Architecture) -> list[int]:
    """Tokens that end a completion, by generation_config.json, else by config.json.

    Raises:
        DataError: they are not token ids.
    """
    where = directory / "generation_config.json"
    stated = read_json(where).get("eos_token_id") if where.exists() else None
    if stated is None:
        where = directory / "config.json"
        stated = getattr(plan.config.get_text_config(), "eos_token_id", None)
    ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise DataError("eos_token_id is not a token id, nor a list of some", str(where))
    return ids


def checkpoint_revision(directory: Path, base_revision: str) -> str:
    """The revision that `load_policy` gives a checkpoint; `base_revision` is for adapters."""
    adapter = directory / "adapter_model.safetensors"
    if adapter.exists():
        return f"{base_revision}.{weights_hash([adapter])}"
    return weights_hash(weight_files(directory))


def reload_policy(policy: Policy, name: str, device: str, dtype: str) -> Policy:
    """The policy with the weights of a newer checkpoint of the same run.

    They are copied into the tensors that are there, so that nothing is allocated or built again.
    One with other weights or shapes, as the first adapter after its base, is loaded afresh.
    """
    directory = model_directory(name)
    adapter = directory / "adapter_model.safetensors"
    here = policy.model.state_dict()
    if adapter.exists() != hasattr(policy.model, "peft_config"):
        return load_policy(name, device, dtype, policy.prompting)
    files = [adapter] if adapter.exists() else weight_files(directory)
    tensors = read_weights(files, lambda key: key)
    if adapter.exists():
        # peft leaves the name of the adapter out.
        parts = (key.rpartition(".") for key in tensors)
        tensors = {
            f"{a}.default.{b}": t for (a, _, b), t in zip(parts, tensors.values(), strict=True)
        }
        wanted = {key for key in here if "lora_" in key}
        base = policy.revision.rpartition(".")[0]
    else:
        tied = getattr(policy.model, "all_tied_weights_keys", None) or {}
        here = _as_on_disk(policy.model, here)
        wanted, base = here.keys() - set(tied), policy.revision
    if not wanted <= tensors.keys() <= here.keys() or any(
        here[key].shape != tensor.shape for key, tensor in tensors.items()
    ):
        return load_policy(name, device, dtype, policy.prompting)
    with torch.no_grad():
        for key, tensor in tensors.items():
            here[key].copy_(tensor)
    return dataclasses.replace(policy, name=name, revision=checkpoint_revision(directory, base))


def _as_on_disk(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a model by their names in its checkpoints, where transformers has others.

    The same tensors, or none are renamed: where a checkpoint holds them joined or divided, what
    came out would be copies.
    """
    from transformers.core_model_loading import revert_weight_conversion

    renamed: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    own = {id(tensor) for tensor in tensors.values()}
    return renamed if all(id(tensor) in own for tensor in renamed.values()) else tensors


def _load_adapter(
    name: str, directory: Path, device: str, dtype: str, prompting: Prompting
) -> Policy:
    """A base model with the peft adapter that `directory` holds.

    Raises:
        DataError: the base model has other weights than when the adapter was trained on it here.
    """
    base_name = adapter_base(directory)
    base = merged(load_policy(base_name, device, dtype, prompting))
    run = directory / "dlmctl.json"
    trained_on = read_json(run).get("reference_revision") if run.exists() else None
    if trained_on not in (None, base.revision):
        raise DataError(
            f"{base_name}, the model that it was trained on, has other weights now; put them back, "
            "or train anew",
            str(directory),
        )
    policy = with_adapter(base, name, directory)
    return dataclasses.replace(policy, revision=checkpoint_revision(directory, base.revision))
