"""How a checkpoint would be read, without its weights: `dlmctl doctor --model`.

The files of weights are neither opened nor downloaded; what refuses a model before its weights are
read refuses it here with the same error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from dlmctl.diffusion.sampling import configured
from dlmctl.models.adapters import CONFIG as ADAPTER_CONFIG
from dlmctl.models.architecture import Architecture, architecture
from dlmctl.models.attention import windowed_layers
from dlmctl.models.families import HOW_TO_READ
from dlmctl.models.loading import TOKENIZER_FILES, config_file, model_directory, policy_of
from dlmctl.models.policy import Policy
from dlmctl.models.sight import TESTED
from dlmctl.models.special_tokens import load_tokenizer
from dlmctl.models.weightless import weightless_model
from dlmctl.models.weights import weight_files
from dlmctl.records.errors import UserFacingError
from dlmctl.records.files import read_json
from dlmctl.settings.families import declared_families


class Trait(NamedTuple):
    """One thing about a model."""

    name: str
    detail: str
    doubtful: bool = False


def describe(name: str) -> list[Trait]:
    """All traits of a model by its name, in the order in which loading settles them.

    Raises:
        MissingInputError: there is no such model.
        DataError: it would be refused.
        TryAgainError: the hub does not answer.
    """
    named = model_directory(name, TOKENIZER_FILES)
    file, reading = config_file(name, TOKENIZER_FILES)
    raw, directory = read_json(file), file.parent
    arch = architecture(raw, str(file), reading)
    model = weightless_model(arch, file, torch.float32)
    tokenizer = load_tokenizer(directory, arch)
    policy = policy_of(name, arch, model, tokenizer, "none", directory)
    return [
        Trait("model", f"{name} ({named})"),
        *_adapter(named),
        Trait("family", f"{arch.family.name}: {declared_families()[arch.family.name].summary}"),
        Trait("class", f"{type(model).__name__} of transformers {transformers.__version__}"),
        Trait("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        Trait("stored as", str(raw.get("dtype", raw.get("torch_dtype", "unknown")))),
        Trait("attention", _attention(arch)),
        Trait("shift", f"{arch.shift}: logits {_place(arch.shift)} predict position i"),
        *_tokens(policy),
        Trait("chat template", "yes" if tokenizer.chat_template else "no: prompts are continued"),
        Trait("sampler", _sampler(policy)),
        _lora(policy),
        *(
            Trait("doubt", doubt, doubtful=True)
            for doubt in _doubts(policy, arch, raw, named, stated=reading.family is not None)
        ),
    ]


def _adapter(directory: Path) -> Iterator[Trait]:
    if (directory / ADAPTER_CONFIG).exists():
        stated = read_json(directory / ADAPTER_CONFIG)
        yield Trait("adapter", f"LoRA of rank {stated.get('r')}, on the model that follows")


def _attention(arch: Architecture) -> str:
    config = arch.config.get_text_config()
    within = ""
    if near := windowed_layers(config):
        of = f"{near} of {config.num_hidden_layers}"
        within = f", in {of} layers within {config.sliding_window} tokens"
    blocks = f" of {arch.blocks.length} tokens" if arch.blocks else ""
    return (arch.family.pattern or "as its class has it") + blocks + within


def _place(shift: int) -> str:
    return "i" if shift == 0 else f"i - {shift}"


def _tokens(policy: Policy) -> Iterator[Trait]:
    def shown(ids: Iterable[int]) -> str:
        return ", ".join(f"{i} {policy.tokenizer.convert_ids_to_tokens(i)!r}" for i in sorted(ids))

    if policy.mask_id is not None:
        yield Trait("mask token", shown([policy.mask_id]))
    yield Trait("end tokens", shown(policy.ends) or "none", doubtful=not policy.ends)
    if policy.turn_ends:
        yield Trait("ends of turns", shown(policy.turn_ends))


def _sampler(policy: Policy) -> str:
    config = configured(policy)
    lengths = {"gen_length": config.gen_length}
    if policy.diffusion:
        lengths |= {"block_length": config.block_length, "steps": config.steps or config.gen_length}
        own = sorted(policy.sampling.keys() - lengths.keys())
        lengths |= {name: getattr(config, name) for name in own}
    return ", ".join(
        f"{name} {value}{' (its own)' if name in policy.sampling else ''}"
        for name, value in lengths.items()
    )


def _lora(policy: Policy) -> Trait:
    modules = [name.rpartition(".")[2] for name, _ in policy.model.named_modules()]
    counts = {name: modules.count(name) for name in policy.model_family.lora_targets}
    found = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    return Trait("LoRA", found or "none of its modules is known, so that it needs all weights")


def _doubts(
    policy: Policy, arch: Architecture, raw: Mapping[str, Any], directory: Path, stated: bool
) -> Iterator[str]:
    """Sentences about what loads, but may not be what the user expects.

    Args:
        stated: the user says of which family it is.
    """
    tokenizer, kind = policy.tokenizer, type(policy.model).__name__
    if arch.doubtful:
        yield "it brings its own code (auto_map), which is not run"
    if raw.get("quantization_config"):
        yield "its weights are quantized, and are read as they are"
    mask = tokenizer.mask_token
    if not policy.diffusion and mask is not None and not stated and not raw.get("dlmctl"):
        yield f"its tokenizer has a mask token, {mask!r}: if it denoises, {HOW_TO_READ}"
    if policy.diffusion and arch.family.pattern and kind not in TESTED:
        yield f"whether a {kind} attends in both directions is only found out by loading it"
    if len(tokenizer) > policy.vocab_size:
        yield f"its tokenizer has {len(tokenizer)} tokens, and the model {policy.vocab_size}"
    if policy.mask_id is not None and policy.mask_id in policy.ends:
        yield "its mask token also ends completions"
    if policy.mask_id is not None and tokenizer.convert_ids_to_tokens(policy.mask_id) is None:
        yield "its tokenizer has no token with the id of the mask token"
    if (directory / ADAPTER_CONFIG).exists():
        return
    try:
        weight_files(directory)
    except UserFacingError as error:
        yield f"loading it would fail: {error}"
