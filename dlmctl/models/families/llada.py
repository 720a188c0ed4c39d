"""LLaDA, a Llama that attends in both directions.

Its checkpoints keep the names of OLMo, and the weights are those of a Llama bit for bit
(arXiv 2502.09992). The original modeling code does not load in transformers 5.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from dlmctl.models.families import ModelFamily, Raw
from dlmctl.records.errors import DataError

LAYER = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
TOP = {"wte": "model.embed_tokens", "ln_f": "model.norm", "ff_out": "lm_head"}
ORIGINAL = re.compile(r"(?:model\.)?transformer\.(?:blocks\.(\d+)\.)?(\w+)\.(weight|bias)")

NOT_LLAMA = {
    "alibi": True,
    "attention_layer_norm": True,
    "input_emb_norm": True,
    "scale_logits": True,
    "rope": False,
}
"""Settings of OLMo that LLaDA's config may have and a Llama cannot express."""

FIXED = {
    "architectures": ["LLaDAModelLM"],
    "model_type": "llada",
    "activation_type": "silu",
    "block_type": "llama",
    "layer_norm_type": "rms",
    "alibi": False,
    "rope": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "weight_tying": False,
}
"""Fields of config.json that are the same in all models of the family that dlmctl writes."""


class LLaDA(ModelFamily):
    model_types = ("llada",)
    own_config = True
    mask_id = 126336
    turn_ends = ("<|eot_id|>",)

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        for name, value in NOT_LLAMA.items():
            if raw.get(name) == value:
                raise DataError(f"a LLaDA model with {name} = {value} is not a Llama", where)
        if raw.get("block_type", "llama") != "llama" or raw.get("layer_norm_type", "rms") != "rms":
            raise DataError("only LLaDA models with Llama blocks and RMS norms are known", where)
        width, heads = raw["d_model"], raw["n_heads"]
        bias = bool(raw.get("include_bias", False))
        return LlamaConfig(
            vocab_size=raw.get("embedding_size") or raw["vocab_size"],
            hidden_size=width,
            intermediate_size=raw.get("mlp_hidden_size") or width * raw.get("mlp_ratio", 4),
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
        )

    def rename(self, name: str) -> str:
        if not (match := ORIGINAL.fullmatch(name)):
            return name
        layer, part, kind = match.groups()
        if layer is None:
            return f"{TOP.get(part, part)}.{kind}"
        return f"model.layers.{layer}.{LAYER.get(part, part)}.{kind}"

    def original_name(self, name: str) -> str:
        path, _, kind = name.rpartition(".")
        layer, _, part = path.removeprefix("model.layers.").partition(".")
        table, ours = (LAYER, part) if layer.isdecimal() else (TOP, path)
        [theirs] = (theirs for theirs, other in table.items() if other == ours)
        block = f"blocks.{layer}." if layer.isdecimal() else ""
        return f"model.transformer.{block}{theirs}.{kind}"

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any]:
        return {
            **FIXED,
            "d_model": config.hidden_size,
            "n_heads": config.num_attention_heads,
            "n_kv_heads": config.num_key_value_heads,
            "n_layers": config.num_hidden_layers,
            "mlp_hidden_size": config.intermediate_size,
            "max_sequence_length": config.max_position_embeddings,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_parameters["rope_theta"],
            "vocab_size": config.vocab_size,
            "embedding_size": config.vocab_size,
            **special_ids,
        }


FAMILY = LLaDA()
