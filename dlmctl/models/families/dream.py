"""Dream, a Qwen2 that attends in both directions, its logits one position to the left.

The weights keep Qwen2's names (arXiv 2508.15487). DiffuCoder and Dream-Coder are of the same class.
Open-dCoder computes the same and publishes the config.json of a plain Qwen2, which says nothing of
it: write MODEL,family=dream,mask_id=ID. The original modeling code does not load in transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen2Config

from dlmctl.models.families import BLOCK_FIELDS, ModelFamily, Raw, decoder_sizes
from dlmctl.records.errors import DataError
from dlmctl.settings.small import SmallModel

SHARED = (
    "hidden_act", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "vocab_size",
)  # fmt: skip
"""Fields that Dream's config.json has in common with Qwen2's, the ids of special tokens aside."""


class Dream(ModelFamily):
    model_types = ("dream",)
    own_config = True
    tokenizer_class = "Qwen2Tokenizer"
    """Dream's own class is the same under another name."""
    mask_id = 151666
    shift = 1
    sampling: Mapping[str, Any] = {
        "block_length": None,
        "schedule": "timesteps",
        "remasking": "entropy",
        "confidence_of": "sampled",
    }
    """As the authors of Dream, Dream-Coder and DiffuCoder call `diffusion_generate`: one block, a
    step for each token, alg="entropy". Their temperature (0.1 to 0.4) and top_p (0.9 or 0.95) are
    for the user to give."""

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        in_blocks = [name for name in BLOCK_FIELDS if raw.get(name) is not None]
        if in_blocks or "DreamForCausalLM" in (raw.get("architectures") or []):
            raise DataError(
                "it is DreamReasoner, a Qwen3 that denoises block by block under Dream's name: not "
                "supported yet",
                where,
            )
        fields = (*SHARED, "eos_token_id", "bos_token_id", "pad_token_id")
        return Qwen2Config(
            **{name: raw[name] for name in fields if name in raw},
            rope_parameters={"rope_type": "default", "rope_theta": raw.get("rope_theta", 1e6)},
        )

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        return Qwen2Config(**decoder_sizes(small, tokenizer), is_causal=False)

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": ["DreamModel"],
            "model_type": "Dream",
            **{name: getattr(config, name) for name in SHARED},
            "rope_theta": config.rope_parameters["rope_theta"],
            **special_ids,
            "bos_token_id": special_ids["eos_token_id"],
        }


FAMILY = Dream()
