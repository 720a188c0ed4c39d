"""RND1, a Qwen3-MoE that attends in both directions, its logits one position to the left.

It was trained from Qwen3-30B-A3B (report of Radical Numerics, 2025). The weights keep Qwen3-MoE's
names. Its own sampler unmasks where the entropy is lowest, over the whole completion at once, as
`--remasking entropy` does. With s of T steps to go it keeps ⌊N s/T⌋ of N tokens masked, which makes
the same numbers if T divides N.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen3MoeConfig

from dlmctl.models.families import ModelFamily, Raw, mixture_sizes
from dlmctl.settings.small import SmallModel

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
    "attention_bias", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
    "norm_topk_prob", "tie_word_embeddings",
)  # fmt: skip
"""Fields that config.json has in common with Qwen3-MoE's, the ids of special tokens aside."""


class RND1(ModelFamily):
    model_types = ("rnd1",)
    own_config = True
    """`rope_scaling` and `sliding_window` are false, which transformers 5 does not take."""
    mask_id = 151669
    shift = 1
    sampling: Mapping[str, Any] = {"gen_length": 256, "block_length": 256, "steps": 256}

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        fields = (*SHARED, "eos_token_id", "bos_token_id", "pad_token_id")
        return Qwen3MoeConfig(
            **{name: raw[name] for name in fields if name in raw},
            rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 1e6)},
        )

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = mixture_sizes(small, tokenizer)
        return Qwen3MoeConfig(**sizes, norm_topk_prob=True, is_causal=False)

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": ["RND1LM"],
            "model_type": "rnd1",
            **{name: getattr(config, name) for name in SHARED},
            "rope_theta": config.rope_parameters["rope_theta"],
            **special_ids,
            "bos_token_id": None,
        }


FAMILY = RND1()
