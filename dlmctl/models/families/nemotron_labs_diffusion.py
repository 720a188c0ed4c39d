"""Nemotron-Labs-Diffusion, a Ministral that denoises a block after a context read causally.

Blocks are counted from the completion's start. The first token of a block is the next token of the
context, and decided first; the rest are predicted at their own positions (nvidia's model card; the
same in ZHZisZZ/dllm). Its other modes, as an autoregressive model and with a draft that it
verifies, are left out: write MODEL,family=ar for the first.
"""

from __future__ import annotations

from typing import Any

from transformers import Ministral3Config, PretrainedConfig

from dlmctl.models.families import Blocks, ModelFamily, Raw, decoder_sizes, stock_config
from dlmctl.records.errors import DataError
from dlmctl.settings.small import SmallModel

PARTS = {"encoder.": "model.", "diffusion_head.": "lm_head."}


class NemotronLabsDiffusion(ModelFamily):
    model_types = ("nemotron_labs_diffusion",)
    own_config = True
    pattern = "block-causal"
    mask_id = 100

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        if raw.get("dlm_paradigm") not in (None, "bidirectional", "block_diff"):
            raise DataError(
                f"its dlm_paradigm is '{str(raw['dlm_paradigm'])[:40]}', which is no diffusion "
                "model: write MODEL,family=ar",
                where,
            )
        kept = {name: value for name, value in raw.items() if name != "attn_implementation"}
        return stock_config({**kept, "model_type": "ministral3"}, where)

    def blocks(self, length: int) -> Blocks:
        return Blocks(length, "completion", causal_context=True, first_alone=True)

    def rename(self, name: str) -> str:
        for theirs, ours in PARTS.items():
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def original_name(self, name: str) -> str:
        for theirs, ours in PARTS.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = decoder_sizes(small, tokenizer)
        return Ministral3Config(
            **sizes, head_dim=small.hidden_size // small.heads, is_causal=False, sliding_window=None
        )


FAMILY = NemotronLabsDiffusion()
