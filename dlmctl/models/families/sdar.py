"""SDAR and TraDo, a Qwen3 (dense or a mixture of experts) that denoises block by block.

Blocks are counted from the beginning of the text (arXiv 2510.06303, JetAstra/SDAR). The config.json
of the dense models does not say how long a block is; all that were published have 4 unless their
name says otherwise (SDAR-1.7B-Chat-b32).
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from dlmctl.models.families import ModelFamily, Raw, decoder_sizes, stock_config
from dlmctl.settings.small import SmallModel


class SDAR(ModelFamily):
    model_types = ("sdar", "sdar_moe")
    classes = ("SDARForCausalLM", "SDARMoeForCausalLM")
    own_config = True
    pattern = "block-causal"
    mask_id = 151669

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        kind = "qwen3_moe" if "moe" in str(raw.get("model_type", "")).lower() else "qwen3"
        return stock_config({**raw, "model_type": kind}, where)

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = decoder_sizes(small, tokenizer)
        return Qwen3Config(**sizes, head_dim=small.hidden_size // small.heads, is_causal=False)


FAMILY = SDAR()
