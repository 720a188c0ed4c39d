"""LoRA adapters on disk: peft's format, in the naming of transformers or of the model's authors.

Adapters that were trained on LLaDA's own classes name modules as these do
(`model.transformer.blocks.0.q_proj`). They are renamed as the weights of the base model are. An
adapter fits if every one of its weights has a module and every module that it names has its
weights; peft itself passes over the rest with a warning.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dlmctl.models.policy import Policy
from dlmctl.models.weights import from_llada, read_weights
from dlmctl.records.errors import DataError, MissingInputError, missing_package
from dlmctl.records.files import read_json
from dlmctl.settings.models import split_name

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, LORA = "base_model.model.", ".lora_"
"""What peft puts before the name of a module, and what it puts behind it."""

RENAMES: dict[str, Callable[[str], str]] = {"llada": from_llada}
"""From the names of a family's authors to those of transformers."""

NAMED = 3
"""Weights that a message names."""


def with_adapter(base: Policy, name: str, directory: Path) -> Policy:
    """A base model with the adapter that `directory` holds, merged if it changes the head.

    Raises:
        UnavailableError: peft is not installed.
        MissingInputError: there are no weights.
        DataError: it is no LoRA adapter, or does not fit the model.
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
    try:
        config: Any = LoraConfig.from_pretrained(str(directory))
        config.inference_mode = True
        if base.family in RENAMES:
            tensors = _renamed(tensors, config, RENAMES[base.family])
        model: Any = PeftModel(base.model, config)
        known = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
        _check_names(tensors.keys() - known, "of no module of the base model", directory)
        _check_names(known - tensors.keys(), "missing", directory)
        set_peft_model_state_dict(model, tensors)
    except DataError:
        raise
    except Exception as error:  # of many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(
            f"the adapter does not fit its base model ({reason})", str(directory)
        ) from None
    policy = dataclasses.replace(base, model=model.eval(), name=name)
    # Scores multiply by the weights of the head, without the layer that peft puts in its place.
    plain_head = isinstance(model.get_base_model().get_output_embeddings(), nn.Linear)
    return policy if plain_head else merged(policy)


def merged(policy: Policy) -> Policy:
    """The same policy as plain weights; one without an adapter is as it was."""
    if not hasattr(policy.model, "peft_config"):
        return policy
    model: Any = policy.model
    plain = model.merge_and_unload().requires_grad_(True)  # which peft took from it
    return dataclasses.replace(policy, model=plain.eval())


def adapter_base(directory: Path) -> str:
    """The name of the model that an adapter belongs to; it may have an adapter itself.

    Raises:
        DataError: it names none, or adapters name each other in a circle.
    """
    seen = {directory.resolve()}
    base = _named_base(directory)
    below = base
    while (place := _local_adapter(below)) is not None:
        if place in seen:
            raise DataError(f"its base model {base} is an adapter on itself", str(directory))
        seen.add(place)
        below = _named_base(place)
    return base


def _named_base(directory: Path) -> str:
    where = directory / CONFIG
    base = read_json(where).get("base_model_name_or_path")
    if not base or not isinstance(base, str) or "\0" in base:
        raise DataError("it does not name its base model", str(where))
    return base


def _local_adapter(name: str) -> Path | None:
    """The directory of an adapter of this machine; None: the name is of something else."""
    path = Path(split_name(name)[0]).expanduser()
    places = (path / "latest", path)
    there = (p for p in places if os.path.exists(p / CONFIG))
    return next((place.resolve() for place in there), None)


def _check_settings(where: Path) -> None:
    settings = read_json(where)
    if settings.get("peft_type") != "LORA":
        kind = str(settings.get("peft_type"))[:40]
        raise DataError(f"an adapter of type {kind!r}: LoRA alone is read here", str(where))
    if settings.get("megatron_config"):
        # With it peft imports whatever module the file names as its megatron_core.
        raise DataError("it needs Megatron, which is not loaded", str(where))


def _renamed(
    tensors: Mapping[str, Tensor], config: Any, rename: Callable[[str], str]
) -> dict[str, Tensor]:
    """Weights under the names of transformers; the config's modules are then given by these."""
    from peft.utils.other import get_pattern_key

    made: dict[str, Tensor] = {}
    modules: dict[str, str] = {}
    saved: set[str] = set()
    for key, tensor in tensors.items():
        module, lora, rest = key.removeprefix(PREFIX).partition(LORA)
        if lora:
            renamed = rename(f"{module}.weight").removesuffix(".weight")
            modules[module] = renamed
        else:
            renamed = rename(module)
            saved.add(renamed.rpartition(".")[0])
        made[f"{PREFIX}{renamed}{lora}{rest}"] = tensor
    if all(old == new for old, new in modules.items()):
        return dict(tensors)
    config.target_modules = set(modules.values())
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        own = {new: get_pattern_key(list(pattern), old) for old, new in modules.items()}
        values = {new: pattern[key] for new, key in own.items() if key in pattern}
        pattern.clear()
        pattern.update(values)
    if config.modules_to_save:
        config.modules_to_save = sorted(saved)
    return made


def _check_names(names: set[str], what: str, directory: Path) -> None:
    if names:
        first = ", ".join(sorted(names)[:NAMED])
        raise DataError(
            f"the adapter does not fit its base model: {len(names)} of its weights are {what}, "
            f"as {first}",
            str(directory),
        )
