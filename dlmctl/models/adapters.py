"""LoRA adapters on disk: peft's format, with the module names of transformers or of the authors.

Adapters that were trained on LLaDA's own classes have the names of these
(`model.transformer.blocks.0.q_proj`). They are renamed as the weights of the base model are. An
adapter fits if each of its weights has a module and each module that it names has its weights;
peft itself only warns about the rest.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dlmctl.models.policy import Policy
from dlmctl.models.quantization import on_disk
from dlmctl.models.weights import read_weights
from dlmctl.records.errors import (
    DataError,
    MissingInputError,
    UsageError,
    missing_package,
    reason_of,
)
from dlmctl.records.files import read_json
from dlmctl.settings.models import split_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, LORA = "base_model.model.", ".lora_"
"""What peft puts before the name of a module, and what it puts after it."""

NAMED = 3
"""How many weights a message names."""


def with_adapter(base: Policy, name: str, directory: Path) -> Policy:
    """A base model with the adapter in `directory`, merged if it changes the head.

    The base model itself gets the adapter's layers; it is left without them on an error.

    Raises:
        UnavailableError: peft is not installed.
        MissingInputError: there are no weights.
        DataError: it is not a LoRA adapter, or does not fit the model.
        UsageError: it changes the head, and the model is quantized.
    """
    try:
        from peft import LoraConfig, PeftModel
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError:
        raise missing_package("peft", "lora", f"the adapter {name}") from None
    if not (directory / WEIGHTS).exists():
        raise MissingInputError(f"{directory} has no {WEIGHTS}")
    _check_settings(directory / CONFIG)
    tensors = read_weights([directory / WEIGHTS], str)
    model: Any = None
    try:
        config: Any = LoraConfig.from_pretrained(str(directory))
        config.inference_mode = True
        tensors = _renamed(tensors, config, base.model_family.rename)
        model = PeftModel(base.model, config)
        known = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        _check_names(tensors.keys() - known, "of no module of the base model", directory)
        _check_names(known - tensors.keys(), "missing", directory)
        set_peft_model_state_dict(model, tensors)
    except Exception as error:  # of many kinds
        if model is not None:
            model.unload().requires_grad_(True)  # peft had frozen it
        if isinstance(error, DataError):
            raise
        reason = reason_of(error)
        raise DataError(
            f"the adapter does not fit its base model ({reason})", str(directory)
        ) from None
    policy = dataclasses.replace(base, model=model.eval(), name=name)
    # Scores multiply by the weights of the head and do not call the layer that peft replaces it by.
    plain_head = isinstance(model.get_base_model().get_output_embeddings(), nn.Linear)
    if plain_head:
        return policy
    if base.quantized:
        raise UsageError(
            f"--quantize: the adapter {name} changes the output head, and is merged, which "
            "quantized weights do not allow; leave --quantize out"
        )
    return merged(policy)


def merged(policy: Policy) -> Policy:
    """The same policy with its adapter merged into the weights, if it has one."""
    if not hasattr(policy.model, "peft_config"):
        return policy
    model: Any = policy.model
    plain = model.merge_and_unload().requires_grad_(True)  # peft had frozen them
    return dataclasses.replace(policy, model=plain.eval())


def trained_on(directory: Path) -> str | None:
    """The revision of the model below an adapter that a run wrote; None: another tool wrote it."""
    run = directory / "dlmctl.json"
    found = read_json(run).get("reference_revision") if run.exists() else None
    return None if found is None else str(found)


def is_base(policy: Policy, directory: Path) -> bool:
    """Whether a policy without an adapter is the model that the one in a directory is based on."""
    below = trained_on(directory)
    if below is None or on_disk(below) != on_disk(policy.revision):
        return False
    # The same weights may be read in another way.
    return split_name(adapter_base(directory))[1] == split_name(policy.name)[1]


def adapter_base(directory: Path) -> str:
    """The name of the model that an adapter belongs to; it may have an adapter itself.

    Raises:
        DataError: it names none, or adapters name each other in a circle.
    """
    seen = {directory.resolve()}
    base = _named_base(directory)
    below = base
    while (adapter := _local_adapter(below)) is not None:
        if adapter in seen:
            raise DataError(f"its base model {base} is an adapter on itself", str(directory))
        seen.add(adapter)
        below = _named_base(adapter)
    return base


def _named_base(directory: Path) -> str:
    where = directory / CONFIG
    base = read_json(where).get("base_model_name_or_path")
    if not base or not isinstance(base, str) or "\0" in base:
        raise DataError("it does not name its base model", str(where))
    return base


def _local_adapter(name: str) -> Path | None:
    """The directory of an adapter on this machine; None: the name is of something else."""
    path = Path(split_name(name)[0]).expanduser()
    for directory in (path / "latest", path):
        if os.path.exists(directory / CONFIG):  # unlike Path.exists, for names that are too long
            return directory.resolve()
    return None


def _check_settings(where: Path) -> None:
    settings = read_json(where)
    if settings.get("peft_type") != "LORA":
        kind = str(settings.get("peft_type"))[:40]
        raise DataError(f"an adapter of type {kind!r}: only LoRA is supported", str(where))
    if settings.get("megatron_config"):
        # With it peft imports whatever module the file names as its megatron_core.
        raise DataError("it needs Megatron, which is not loaded", str(where))


def _renamed(
    tensors: Mapping[str, Tensor], config: Any, rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """Weights under the names of transformers, and the config's modules set to match."""
    from peft.utils.other import get_pattern_key

    weights: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    saved: set[str] = set()  # modules that are trained whole
    for key, tensor in tensors.items():
        module, lora, rest = key.removeprefix(PREFIX).partition(LORA)
        if lora:
            renamed = rename(f"{module}.weight").removesuffix(".weight")
            modules[module] = renamed
        else:
            renamed = rename(module)
            saved.add(renamed.rpartition(".")[0])
        weights[f"{PREFIX}{renamed}{lora}{rest}"] = tensor
    if all(old == new for old, new in modules.items()):
        return dict(tensors)
    config.target_modules = set(modules.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        keys = {new: get_pattern_key(list(pattern), old) for old, new in modules.items()}
        values = {new: pattern[key] for new, key in keys.items() if key in pattern}
        pattern.clear()
        pattern.update(values)
    if config.modules_to_save:
        config.modules_to_save = sorted(saved)
    return weights


def _check_names(names: set[str], what: str, directory: Path) -> None:
    if names:
        first = ", ".join(sorted(names)[:NAMED])
        raise DataError(
            f"the adapter does not fit its base model: {len(names)} of its weights are {what}, "
            f"as {first}",
            str(directory),
        )
