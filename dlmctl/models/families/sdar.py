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
from dlmctl.records.errors import DataError
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
        name = PUBLISHED.search(f"{where} {raw.get('_name_or_path', '')}")
        if name is None:
            return stated
        named = int(name[1] or 4)
        if name[1] is not None and stated not in (None, named):
            raise DataError(
                f"its name says blocks of {named} tokens, and its config.json {stated}: write "
                f"MODEL,block_length={named}, or the length that it was trained with",
                where,
            )
        return named if stated is None else stated

    def check(self, raw: Raw, where: str) -> None:
        mask_id = raw.get("mask_token_id")
        if mask_id is not None and mask_id == raw.get("eos_token_id"):
            raise DataError(
                f"its mask_token_id {mask_id} is also its end-of-sequence token; the published "
                "models have the mask token 151669: write MODEL,family=sdar,mask_id=151669",
                where,
            )

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = decoder_sizes(small, tokenizer)
        return Qwen3Config(**sizes, head_dim=small.hidden_size // small.heads, is_causal=False)


FAMILY = SDAR()
