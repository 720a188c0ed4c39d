"""Any decoder that denoises block by block, as dllm's BD3LM (a new one is a Qwen3).

Blocks are counted from the completion's start, and the prompt's first block may be short
(arXiv 2503.09573; ZHZisZZ/dllm). A2D's config.json says neither that a model is of this kind nor
how long its blocks are: write MODEL,family=bd3lm,block_length=32.
"""

from __future__ import annotations

from dlmctl.models.attention import Blocks
from dlmctl.models.families.a2d import A2D


class BlockDiffusion(A2D):
    model_types = ()
    pattern = "block-causal"

    def blocks(self, length: int) -> Blocks:
        return Blocks(length, "completion")


FAMILY = BlockDiffusion()
