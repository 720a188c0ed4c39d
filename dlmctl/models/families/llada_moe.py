"""LLaDA-MoE, a Qwen3-MoE that attends in both directions.

Unlike Qwen3's, its router does not renormalise the probabilities of the chosen experts
(arXiv 2509.24389). Its config.json has LLaDA's type and fields of its own; its weights have the
names of Qwen3-MoE. The original modeling code does not load in transformers 5.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3MoeConfig

from dlmctl.models.families import ModelFamily, Raw, mixture_sizes
from dlmctl.records.errors import DataError
from dlmctl.settings.small import SmallModel

SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "num_experts",
    "num_experts_per_tok", "tie_word_embeddings", "eos_token_id", "bos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields that config.json has in common with Qwen3-MoE's."""

RENAMED = {
    "dense_intermediate_size": "intermediate_size",
    "expert_intermediate_size": "moe_intermediate_size",
}

ONLY: dict[str, tuple[Any, ...]] = {
    "shared_expert_intermediate_size": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "clip_qkv": (None,),
    "qk_layernorm": (True,),
    "partial_rotary_factor": (1, None),
    "rope_scaling": (None,),
}
"""The values of further fields with which the model is a Qwen3-MoE; the published ones have them.
The authors' code ignores `norm_topk_prob`, and computes a softmax whatever the score function."""


class LLaDAMoE(ModelFamily):
    model_types = ("lladamoe",)
    """The name that dLLM's copy of the model has; the authors' own is LLaDA's."""
    classes = ("LLaDAMoE*",)
    own_config = True
    mask_id = 156895
    turn_ends = ("<|role_end|>",)

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        for name, values in ONLY.items():
            if raw.get(name) not in values:
                raise DataError(
                    f"a LLaDA-MoE model with {name} = {raw.get(name)} is not a Qwen3-MoE", where
                )
        layers = raw["num_hidden_layers"]
        dense = [i for i, moe in enumerate(raw.get("moe_layer_freq") or [1] * layers) if not moe]
        return Qwen3MoeConfig(
            **{name: raw[name] for name in SAME if name in raw},
            **{theirs: raw[name] for name, theirs in RENAMED.items()},
            head_dim=raw["hidden_size"] // raw["num_attention_heads"],
            rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
            norm_topk_prob=False,
            mlp_only_layers=dense,
        )

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = mixture_sizes(small, tokenizer)
        return Qwen3MoeConfig(**sizes, norm_topk_prob=False, is_causal=False)

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any]:
        dense, layers = config.mlp_only_layers, range(config.num_hidden_layers)
        return {
            "architectures": ["LLaDAMoEModelLM"],
            "model_type": "llada",
            **{name: getattr(config, name) for name in SAME},
            **{name: getattr(config, theirs) for name, theirs in RENAMED.items()},
            "moe_layer_freq": [int(layer not in dense) for layer in layers],
            "rope_theta": config.rope_parameters["rope_theta"],
            **{name: values[0] for name, values in ONLY.items()},
            "moe_router_score_function": "softmax",
            **special_ids,
        }


FAMILY = LLaDAMoE()
