"""SDAR and TraDo, a Qwen3 (dense or a mixture of experts) that denoises block by block.

Blocks are counted from the beginning of the text (arXiv 2510.06303, JetAstra/SDAR; TraDo: arXiv
2509.06949). If config.json does not state `block_size`, the published names do: 4 tokens, or 32 of
SDAR-1.7B-Chat-b32.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from dlmctl.models.families import ModelFamily, Raw, decoder_sizes, stock_config
from dlmctl.settings.small import SmallModel

PUBLISHED = re.compile(r"(?:SDAR|TraDo)-[\w.]+(?:-A3B)?-(?:Chat|Sci|Instruct|Thinking)(?:-b(\d+))?")
"""Names on the hub, with the length of a block unless it is 4."""


class SDAR(ModelFamily):
    model_types = ("sdar", "sdar_moe")
    classes = ("SDARForCausalLM", "SDARMoeForCausalLM")
    own_config = True
    pattern = "block-causal"

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        kind = "qwen3_moe" if "moe" in str(raw.get("model_type", "")).lower() else "qwen3"
        return stock_config({**raw, "model_type": kind}, where)

    def block_length(self, raw: Raw, where: str) -> int | None:
        stated = super().block_length(raw, where)
        if stated is None and (name := PUBLISHED.search(f"{where} {raw.get('_name_or_path', '')}")):
            stated = int(name[1] or 4)
        return stated

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = decoder_sizes(small, tokenizer)
        return Qwen3Config(**sizes, head_dim=small.hidden_size // small.heads, is_causal=False)


FAMILY = SDAR()
