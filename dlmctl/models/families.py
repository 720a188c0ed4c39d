"""Families of models: what a config.json says, as a stock transformers model and its conventions.

    llada   LlamaForCausalLM made bidirectional, weights renamed            (arXiv 2502.09992)
    dream   Qwen2ForCausalLM made bidirectional, logits shifted by one      (arXiv 2508.15487)
    a2d     any decoder made bidirectional: `a2d-*`, or is_causal = false
    mlm     BERT, RoBERTa, ModernBERT, DistilBERT: denoisers already
    vlm     Qwen2.5-VL, Qwen3-VL, LLaVA: images beside the text, left to right
    ar      everything else: AutoModelForCausalLM, left to right

A config with `is_causal = False` makes a stock decoder of transformers attend in both directions,
so that no model brings code of its own. Models are read without their dropout.

What decides, in this order: settings behind the model's name (`DIR,family=a2d,mask_id=151669`);
the object `dlmctl` in config.json, with `family`, `mask_token_id`, `shift` and `sampling`, which
every checkpoint written here has; the rest of config.json. A checkpoint that the rest of its
config.json does not describe rightly is refused: one with a class that transformers does not have,
with a mask token in a model that goes from left to right, or with signs of block diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from dlmctl.models.policy import LEFT_TO_RIGHT, usual_shift
from dlmctl.models.vision import KINDS
from dlmctl.models.weights import from_llada
from dlmctl.records.errors import DataError
from dlmctl.settings.models import Family, Reading

LLADA_MASK_ID, DREAM_MASK_ID = 126336, 151666

NOT_LLAMA = {
    "alibi": True,
    "attention_layer_norm": True,
    "input_emb_norm": True,
    "scale_logits": True,
    "rope": False,
}
"""Settings of OLMo that LLaDA's config may name and a Llama cannot express."""


MOST_LAYERS = 10_000
TURN_ENDS = {"llada": ("<|eot_id|>",)}
"""Tokens of a family that end a turn and not the completion."""

BLOCK_SIGNS = ("block_size", "block_length", "bd_size", "diffusion_block_size", "dlm_paradigm")
"""Fields of config.json that tell of block diffusion, in models that have a mask token."""

HOW = (
    "say how to read it with --family, --shift and --mask-id, or behind its name as in "
    "MODEL,family=a2d,mask_id=ID"
)
FAULTS = (
    LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers raises on values of the wrong kind."""


@dataclass(frozen=True)
class Architecture:
    """How a checkpoint is to be read."""

    family: Family
    config: PretrainedConfig
    rename: Callable[[str], str] = str
    """From the checkpoint's weight names to transformers'."""
    mask_id: int | None = None
    """Where the config names it; otherwise the tokenizer does."""
    shift: int = 0
    sampling: dict[str, int] = field(default_factory=dict)
    doubtful: bool = False
    """It is of a class of transformers, and its authors' code may be another of the same name."""


def architecture(raw: dict[str, Any], where: str, reading: Reading | None = None) -> Architecture:
    """Read a config.json.

    Args:
        reading: what is to be taken in its place.

    Raises:
        DataError: the model is of no kind that is known here, or its config.json says of it what
            cannot be.
    """
    _check_layers(raw, where)
    try:
        plan = _planned(raw, where, reading or Reading())
    except FAULTS as error:
        reason = str(error).strip().split("\n")[-1].strip()[:200]
        raise DataError(f"not a model's configuration ({reason})", where) from None
    if plan.family not in get_args(Family):
        raise DataError(f"there is no family '{str(plan.family)[:80]}'", where)
    whole = (plan.shift, *plan.sampling.values(), 0 if plan.mask_id is None else plan.mask_id)
    if not all(type(number) is int and 0 <= number < 2**31 for number in whole):
        raise DataError("mask_token_id, shift and sampling are not whole numbers", where)
    return plan


def _check_layers(raw: dict[str, Any], where: str) -> None:
    """Refuse counts of layers for which transformers would write lists without end."""
    for name, value in raw.items():
        if isinstance(value, dict):
            _check_layers(value, where)
        counts = name.endswith(("layers", "n_layer", "depth")) and isinstance(value, (int, float))
        if counts and value > MOST_LAYERS:
            raise DataError(f"{name} = {str(value)[:20]} is more than any model has", where)


def _planned(raw: dict[str, Any], where: str, reading: Reading) -> Architecture:
    kind = str(raw.get("model_type", "")).lower()
    if kind in ("llada", "dream"):
        if reading.family not in (None, kind):
            raise DataError(f"it is of family {kind}, not {reading.family}", where)
        plan = _llada(raw, where) if kind == "llada" else _dream(raw)
    else:
        plan = _by_transformers(raw, where, reading)
    return replace(
        plan,
        mask_id=plan.mask_id if reading.mask_id is None else reading.mask_id,
        shift=plan.shift if reading.shift is None else reading.shift,
    )


def _by_transformers(raw: dict[str, Any], where: str, reading: Reading) -> Architecture:
    """A checkpoint that is of a type of transformers, or that of A2D for one."""
    kind = str(raw.get("model_type", "")).lower()
    marker = raw.get("dlmctl") or {}
    converted = kind.startswith("a2d-")
    config = _stock({**raw, "model_type": kind.removeprefix("a2d-")} if converted else raw, where)
    family: Family = (
        reading.family or marker.get("family") or ("a2d" if converted else _stock_family(raw))
    )
    if reading.family is None and not marker:
        _check_described(raw, family, where)
    if family not in (*LEFT_TO_RIGHT, "mlm"):
        config.is_causal = False
    elif family in LEFT_TO_RIGHT and getattr(config, "is_causal", True) is False:
        config.is_causal = True
    shift = usual_shift(family)
    if reading.family in (None, marker.get("family")):
        shift = marker.get("shift", shift)
    mask_id = marker.get("mask_token_id", raw.get("mask_token_id"))
    sampling = dict(marker.get("sampling") or {})
    doubtful = bool(raw.get("auto_map")) and reading.family is None and not marker
    return Architecture(
        family, config, mask_id=mask_id, shift=shift, sampling=sampling, doubtful=doubtful
    )


def _check_described(raw: dict[str, Any], family: Family, where: str) -> None:
    """Refuse a config.json which transformers would read as another model than it is of."""
    if str(raw.get("model_type", "")).lower().startswith("a2d-"):
        _check_a2d(raw, where)
        return
    signs = [name for name in BLOCK_SIGNS if name in raw]
    if signs and (family == "a2d" or raw.get("mask_token_id") is not None):
        raise DataError(
            f"its {signs[0]} tells of block diffusion, which is not read yet; if the model attends "
            f"to the whole text, {HOW}",
            where,
        )
    there = dir(transformers)
    unknown = [name for name in _classes(raw) if name not in there]
    if unknown:
        raise DataError(
            f"its class {unknown[0]} is not of transformers, so that its type "
            f"'{raw.get('model_type')}' does not say how it attends; {HOW}",
            where,
        )
    if family in LEFT_TO_RIGHT and raw.get("mask_token_id") is not None:
        raise DataError(
            "it has a mask token and would be read from left to right: is it a diffusion model? "
            f"Then {HOW}; or write family=ar",
            where,
        )


def _classes(raw: dict[str, Any]) -> list[str]:
    """Names of the classes that a config.json says the model is of."""
    own = raw.get("auto_map") or {}
    mapped = [own[name] for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM") if name in own]
    named = [*(raw.get("architectures") or []), *(str(name).rpartition(".")[2] for name in mapped)]
    return [str(name) for name in named]


def _check_a2d(raw: dict[str, Any], where: str) -> None:
    """Refuse a model of A2D unless it says that it attends to the whole text.

    Its block diffusion (BD3LM) and its plain one (MDLM) have the same config.json but for names.
    """
    names = f"{where} {raw.get('_name_or_path', '')}".lower()
    if "bd3lm" in names or any(name in raw for name in BLOCK_SIGNS):
        raise DataError("it is a model of block diffusion (BD3LM), which is not read yet", where)
    if "mdlm" not in names:
        raise DataError(
            "A2D's config.json does not say whether the model attends to the whole text (MDLM) or "
            "block by block (BD3LM, not read yet); if to the whole text, write --family a2d, or "
            "MODEL,family=a2d",
            where,
        )


def _stock(raw: dict[str, Any], where: str) -> PretrainedConfig:
    fields = {k: v for k, v in raw.items() if k not in ("model_type", "auto_map", "architectures")}
    try:
        config = AutoConfig.for_model(raw.get("model_type", ""), **fields)
    except (ValueError, KeyError) as error:
        reason = str(error).split("\n")[0][:200]
        raise DataError(
            f"model type '{raw.get('model_type')}' is not known to transformers ({reason}); models "
            "that bring their own code are not loaded",
            where,
        ) from None
    config.architectures = raw.get("architectures")
    parts = [getattr(config, name, None) for name in ("text_config", "vision_config")]
    for part in (config, *(part for part in parts if isinstance(part, PretrainedConfig))):
        for name in vars(part):
            if name.endswith(("dropout", "dropout_prob", "_pdrop")) and getattr(part, name):
                # A score and its gradient must be those of one and the same function.
                setattr(part, name, 0.0)
    return config


def _stock_family(raw: dict[str, Any]) -> Family:
    if any(str(name).endswith("ForMaskedLM") for name in raw.get("architectures") or []):
        return "mlm"
    if raw.get("model_type") in KINDS:
        return "vlm"
    return "a2d" if raw.get("is_causal") is False else "ar"


def _llada(raw: dict[str, Any], where: str) -> Architecture:
    for name, value in NOT_LLAMA.items():
        if raw.get(name) == value:
            raise DataError(f"a LLaDA model with {name} = {value} is not a Llama", where)
    if raw.get("block_type", "llama") != "llama" or raw.get("layer_norm_type", "rms") != "rms":
        raise DataError("only LLaDA models with Llama blocks and RMS norms are known", where)
    heads = raw["n_heads"]
    bias = bool(raw.get("include_bias", False))
    config = LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw.get("mlp_hidden_size") or raw["d_model"] * raw.get("mlp_ratio", 4),
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=raw.get("n_kv_heads") or heads,
        max_position_embeddings=raw.get("max_sequence_length", 4096),
        rms_norm_eps=raw.get("rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)},
        attention_bias=bool(raw.get("include_qkv_bias", bias)),
        mlp_bias=bias,
        tie_word_embeddings=bool(raw.get("weight_tying", False)),
        eos_token_id=raw.get("eos_token_id"),
        pad_token_id=raw.get("pad_token_id"),
        is_causal=False,
    )
    return Architecture("llada", config, from_llada, raw.get("mask_token_id", LLADA_MASK_ID))


def _dream(raw: dict[str, Any]) -> Architecture:
    keep = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"]
    keep += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    keep += ["rms_norm_eps", "tie_word_embeddings", "hidden_act"]
    keep += ["eos_token_id", "bos_token_id", "pad_token_id"]
    config = Qwen2Config(
        **{name: raw[name] for name in keep if name in raw},
        rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 1e6)},
        is_causal=False,
    )
    return Architecture("dream", config, mask_id=raw.get("mask_token_id", DREAM_MASK_ID), shift=1)
