"""LLaDA2, a mixture of experts that denoises block by block, as GLM-4's with Ling's names.

Its blocks of 32 tokens are counted from the beginning of the text (arXiv 2512.15745). Its router,
which chooses among groups of experts by sigmoids and a bias, its shared expert and its partial
rotary embeddings are those of transformers' `sarvam_moe`, which renames and splits the weights.
The authors sample with `--threshold 0.95 --early-stop`. LLaDA2.1 (arXiv 2602.08676) also replaces
tokens that are decided, with `--edit-threshold 0.9`. As its config.json is that of LLaDA2.0, this
is not its own default.
"""

from __future__ import annotations

import re
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig

from dlmctl.models.families import ModelFamily, Raw, mixture_sizes, stock_config
from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.settings.small import SmallModel

SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "use_qk_norm", "use_qkv_bias",
    "num_experts", "num_shared_experts", "num_experts_per_tok", "n_group", "topk_group",
    "routed_scaling_factor", "first_k_dense_replace", "tie_word_embeddings",
)  # fmt: skip
"""Fields that config.json has in common with sarvam_moe's, the ids of special tokens aside."""

ONLY: dict[str, tuple[Any, ...]] = {
    "use_bias": (False, None),
    "norm_head": (False, None),
    "rope_scaling": (None,),
    "score_function": ("sigmoid", None),
    "norm_topk_prob": (True, None),
}
"""The values of further fields with which transformers computes the same; the published models have
them. Without `use_bias` the weights decide: a bias would be left over, and is refused."""

STOCK = "sarvam_moe"

NEXT = re.compile(r"LLaDA2\.2", re.IGNORECASE)
"""In the name of checkpoints of the same type that another router computes (inclusionAI, 2026)."""


class LLaDA2(ModelFamily):
    model_types = ("llada2_moe", "llada21_moe")
    own_config = True
    pattern = "block-causal"
    mask_id = 156895
    turn_ends = ("<|role_end|>",)

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        routed = any("capacity" in name or "block_rout" in name for name in raw)
        if routed or NEXT.search(f"{where} {raw.get('_name_or_path', '')}"):
            raise DataError(
                "it is LLaDA2.2, whose router chooses experts for a block as a whole and whose "
                "sampler inserts and deletes tokens: not supported yet",
                where,
            )
        for name, values in ONLY.items():
            if raw.get(name) not in values:
                raise DataError(f"a LLaDA2 model with {name} = {raw.get(name)} is not known", where)
        for name, least in ("num_shared_experts", 1), ("num_experts_per_tok", 2):
            if (raw.get(name) or 0) < least:
                raise DataError(f"a LLaDA2 model with {name} = {raw.get(name)} is not known", where)
        fields = (*SHARED, "eos_token_id", "bos_token_id", "pad_token_id")
        return _stock({name: raw[name] for name in fields if name in raw} | _rotary(raw), where)

    def block_length(self, raw: Raw, where: str) -> int | None:
        return super().block_length(raw, where) or 32

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = mixture_sizes(small, tokenizer)
        groups = {
            "n_group": 2,
            "topk_group": 1,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
        }
        raw = {**sizes, **groups, "rope_theta": 10000.0, "is_causal": False}
        return _stock(raw | _rotary(raw), "a new model")

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any]:
        rope = config.rope_parameters
        return {
            "architectures": ["LLaDA2MoeModelLM"],
            "model_type": "llada2_moe",
            **{name: getattr(config, name) for name in SHARED},
            **{name: values[0] for name, values in ONLY.items()},
            "rope_theta": rope["rope_theta"],
            "partial_rotary_factor": rope["partial_rotary_factor"],
            **special_ids,
        }


def _stock(fields: dict[str, Any], where: str) -> PretrainedConfig:
    if STOCK not in CONFIG_MAPPING:
        raise UnavailableError(
            f"LLaDA2 needs transformers 5.24 or later, and this is {transformers.__version__}: "
            "run  pip install -U transformers"
        )
    return stock_config({**fields, "model_type": STOCK}, where)


def _rotary(raw: Raw) -> dict[str, Any]:
    factor = raw.get("partial_rotary_factor", 0.5)
    theta = raw.get("rope_theta", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": factor}
    return {"rope_parameters": rope, "partial_rotary_factor": factor}


FAMILY = LLaDA2()
