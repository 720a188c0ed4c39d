"""Families of models: what a config.json says, as a stock transformers model and its conventions.

    llada   LlamaForCausalLM made bidirectional, weights renamed            (arXiv 2502.09992)
    dream   Qwen2ForCausalLM made bidirectional, logits shifted by one      (arXiv 2508.15487)
    a2d     any decoder made bidirectional: `a2d-*`, or is_causal = false
    mlm     BERT, RoBERTa, ModernBERT, DistilBERT: denoisers already
    vlm     Qwen2.5-VL, Qwen3-VL, LLaVA: images beside the text, left to right
    ar      everything else: AutoModelForCausalLM, left to right

A config with `is_causal = False` makes a stock decoder of transformers attend in both directions,
so that no model brings code of its own. Models are read without their dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, get_args

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from dlmctl.models.policy import LEFT_TO_RIGHT, Family
from dlmctl.models.vision import KINDS
from dlmctl.models.weights import from_llada
from dlmctl.records.errors import DataError

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


def architecture(raw: dict[str, Any], where: str) -> Architecture:
    """Read a config.json.

    Raises:
        DataError: the model is of no kind that is known here.
    """
    _check_layers(raw, where)
    try:
        plan = _planned(raw, where)
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


def _planned(raw: dict[str, Any], where: str) -> Architecture:
    kind = str(raw.get("model_type", "")).lower()
    if kind == "llada":
        return _llada(raw, where)
    if kind == "dream":
        return _dream(raw)
    marker = raw.get("dlmctl") or {}
    mask_id = marker.get("mask_token_id", raw.get("mask_token_id"))
    sampling = dict(marker.get("sampling") or {})
    if kind.startswith("a2d-"):
        config = _stock({**raw, "model_type": kind.removeprefix("a2d-")}, where)
        config.is_causal = False
        return Architecture("a2d", config, mask_id=mask_id, sampling=sampling)
    config = _stock(raw, where)
    family = marker.get("family") or _stock_family(raw)
    shift = marker.get("shift", 1 if family in (*LEFT_TO_RIGHT, "dream") else 0)
    return Architecture(family, config, mask_id=mask_id, shift=shift, sampling=sampling)


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
