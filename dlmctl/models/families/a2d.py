"""Any decoder that attends in both directions (a new one is a Qwen3).

A checkpoint is one of type `a2d-TYPE`, or a stock one with `is_causal` = false. A2D's block
diffusion (BD3LM) and its plain models (MDLM) have the same config.json but for names.
"""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from dlmctl.models.families import BLOCK_SIGNS, ModelFamily, Raw, decoder_sizes
from dlmctl.records.errors import DataError
from dlmctl.settings.small import SmallModel

PREFIX = "a2d-"


class A2D(ModelFamily):
    model_types: tuple[str, ...] = (f"{PREFIX}*",)

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        kind = str(raw.get("model_type", "")).lower().removeprefix(PREFIX)
        return super().config({**raw, "model_type": kind}, where)

    def check(self, raw: Raw, where: str) -> None:
        if not str(raw.get("model_type", "")).lower().startswith(PREFIX):
            super().check(raw, where)
            return
        names = f"{where} {raw.get('_name_or_path', '')}".lower()
        if "bd3lm" in names or any(name in raw for name in BLOCK_SIGNS):
            raise DataError(
                "it is a block diffusion model (BD3LM), and A2D's config.json does not say how "
                "many tokens a block has: write MODEL,family=bd3lm,block_length=32, or the length "
                "that it was trained with",
                where,
            )
        if "mdlm" not in names:
            raise DataError(
                "A2D's config.json does not say whether the model attends to the whole text (MDLM) "
                "or block by block (BD3LM): write MODEL,family=a2d, or "
                "MODEL,family=bd3lm,block_length=32",
                where,
            )

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = decoder_sizes(small, tokenizer)
        return Qwen3Config(**sizes, head_dim=small.hidden_size // small.heads, is_causal=False)


FAMILY = A2D()
