"""From a config.json to a family, a stock model of transformers and its conventions.

What decides, in this order: settings behind the model's name (`DIR,family=a2d,mask_id=151669`);
the object `dlmctl` in config.json, with `family`, `mask_token_id`, `shift`, `block_length`,
`latent_masks` and `sampling`, which every checkpoint written here has; the rest of config.json. A
checkpoint is refused if the rest of its config.json does not describe it: if it names a class that
transformers does not have, has a mask token but a left-to-right model, or shows signs of block
diffusion.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from dlmctl.models.attention import Blocks
from dlmctl.models.families import ModelFamily, Raw
from dlmctl.models.refused import refuse_known
from dlmctl.records.errors import DataError
from dlmctl.settings.families import declared_families
from dlmctl.settings.models import Reading
from dlmctl.settings.sampler import check_own

MOST_LAYERS = 10_000
FAULTS = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises on values of the wrong kind."""


@dataclass(frozen=True)
class Architecture:
    """How a checkpoint is to be read."""

    family: ModelFamily
    config: PretrainedConfig
    rename: Callable[[str], str]
    """From the checkpoint's weight names to those of transformers."""
    mask_id: int | None
    """None: the tokenizer states it."""
    shift: int
    blocks: Blocks | None
    """Of a block-causal model."""
    sampling: dict[str, Any]
    latent_masks: tuple[int, ...]
    """See models/latent_masks."""
    doubtful: bool
    """It is of a class of transformers, but its authors' code may be a different class of the same
    name."""

    def model_class(self, where: str) -> Any:
        """The class of transformers to load it with; raises DataError if there is none."""
        auto: Any = getattr(transformers, self.family.auto_class)
        try:
            return auto._model_mapping[type(self.config)]
        except KeyError:
            raise DataError(
                f"{where}: a model of type '{self.config.model_type}' is no language model"
            ) from None

    def kernel(self, factory: Any) -> str:
        """Which attention of transformers to load that class with: sdpa, or eager where sdpa cannot
        compute it, as Gemma 2's capped scores."""
        capped = getattr(self.config.get_text_config(), "attn_logit_softcapping", None)
        return "eager" if capped or not factory._supports_sdpa else "sdpa"


@functools.cache
def family_named(name: str) -> ModelFamily:
    """The family with this name, which is one of `declared_families()`."""
    module = importlib.import_module(f"dlmctl.models.families.{name.replace('-', '_')}")
    family: ModelFamily = module.FAMILY
    return family


def all_families() -> list[ModelFamily]:
    """Every family, by name."""
    return [family_named(name) for name in declared_families()]


def recognised_family(raw: Raw) -> ModelFamily:
    """The family that a config.json describes, dlmctl's own field left aside."""
    kind, names = str(raw.get("model_type", "")).lower(), raw.get("architectures") or []
    own = [family for family in all_families() if family.own_config]
    rules: list[tuple[list[Any], str, list[ModelFamily]]] = [
        (names, "classes", own),  # LLaDA-MoE has the type of LLaDA
        ([kind], "model_types", all_families()),
        (names, "classes", all_families()),
    ]
    for values, patterns, families in rules:
        for family in families:
            if any(fnmatchcase(str(v), p) for v in values for p in getattr(family, patterns)):
                return family
    return family_named("a2d" if raw.get("is_causal") is False else "ar")


def architecture(raw: dict[str, Any], where: str, reading: Reading | None = None) -> Architecture:
    """Read a config.json.

    Args:
        reading: what the user says instead of it.

    Raises:
        DataError: no known family fits, or config.json has impossible values.
    """
    _check_layers(raw, where)
    refuse_known(raw, where)
    try:
        chosen = _architecture(raw, where, reading or Reading())
    except FAULTS as error:
        reason = str(error).strip().split("\n")[-1].strip()[:200]
        raise DataError(f"not a model's configuration ({reason})", where) from None
    mask_id = 0 if chosen.mask_id is None else chosen.mask_id
    numbers = (chosen.shift, mask_id)
    if chosen.blocks is not None and not (
        type(chosen.blocks.length) is int and 0 < chosen.blocks.length < 2**31
    ):
        raise DataError("block_length is not a positive whole number", where)
    if not all(type(number) is int and 0 <= number < 2**31 for number in numbers):
        raise DataError("mask_token_id and shift are not whole numbers", where)
    _check_latent_masks(chosen, where)
    try:
        check_own(chosen.sampling)
    except ValueError as error:
        raise DataError(str(error), where) from None
    return chosen


def _check_layers(raw: Raw, where: str) -> None:
    """Refuse numbers of layers for which transformers would write endless lists."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_layers(value, where)
        counts = name.endswith(("layers", "n_layer", "depth")) and isinstance(value, (int, float))
        if counts and value > MOST_LAYERS:
            raise DataError(f"{name} = {str(value)[:20]} is more than any model has", where)


def _check_latent_masks(chosen: Architecture, where: str) -> None:
    """Raise DataError unless they are mask tokens in the vocabulary, the first `mask_id`."""
    masks = chosen.latent_masks
    if not masks:
        return
    size = chosen.config.get_text_config().vocab_size
    sound = all(type(n) is int and 0 <= n < size for n in masks)
    if not (sound and len(set(masks)) == len(masks) > 1 and masks[0] == chosen.mask_id):
        raise DataError("latent_masks are not the ids of several mask tokens", where)


def _architecture(raw: Raw, where: str, reading: Reading) -> Architecture:
    # 1. Who wrote the config.json: that family reads its fields and renames its weights.
    recognised = recognised_family(raw)
    marker = raw.get("dlmctl") or {}
    named = reading.family or marker.get("family") or recognised.name
    if recognised.own_config and named != recognised.name:
        raise DataError(f"it is of family {recognised.name}, not {str(named)[:80]}", where)
    config = recognised.config(raw, where)

    # 2. Which family's conventions the model follows.
    if named not in [*declared_families()]:  # it may not be hashable
        names = ", ".join(declared_families())
        raise DataError(f"there is no family '{str(named)[:80]}'; there are {names}", where)
    family = family_named(named)
    stated = reading.family is not None or bool(marker)
    if not stated:
        recognised.check(raw, where)
    causal = family.pattern == "causal"
    if family.pattern is not None and causal != getattr(config, "is_causal", True):
        config.is_causal = causal

    # 3. Numbers, of which the user's come first.
    shift = family.shift
    if reading.family in (None, marker.get("family")):
        shift = marker.get("shift", shift)
    mask_id = marker.get("mask_token_id", raw.get("mask_token_id", recognised.mask_id))
    return Architecture(
        family,
        config,
        # The family that is named may know names of a config.json that says nothing of it.
        rename=lambda name: family.rename(recognised.rename(name)),
        mask_id=mask_id if reading.mask_id is None else reading.mask_id,
        shift=shift if reading.shift is None else reading.shift,
        blocks=_blocks(family, raw, reading, where),
        sampling=dict(marker.get("sampling", family.sampling) or {}),
        latent_masks=tuple(marker.get("latent_masks") or ()),
        doubtful=bool(raw.get("auto_map")) and not stated and not recognised.own_config,
    )


def _blocks(family: ModelFamily, raw: Raw, reading: Reading, where: str) -> Blocks | None:
    if family.pattern != "block-causal":
        if reading.block_length is not None:
            raise DataError(
                f"block_length={reading.block_length} is for block-causal models, and family "
                f"{family.name} is {family.pattern or 'as its class attends'}",
                where,
            )
        return None
    length = reading.block_length or (raw.get("dlmctl") or {}).get("block_length")
    if length is None and (length := family.block_length(raw, where)) is None:
        raise DataError(
            "its config.json does not say how many tokens a block has: write MODEL,block_length=B",
            where,
        )
    return family.blocks(length)
