"""Any decoder that denoises block by block, as dllm's BD3LM (a new one is a Qwen3).

Blocks are counted from the completion's start, and the prompt's first block may be short
(arXiv 2503.09573; ZHZisZZ/dllm). A2D's config.json says neither that a model is of this kind nor
how long its blocks are: write MODEL,family=bd3lm,block_length=32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.models.families import Blocks
from dlmctl.models.families.a2d import A2D


class BlockDiffusion(A2D):
    model_types = ()
    pattern = "block-causal"
    sampling: Mapping[str, Any] = {"schedule": "rounded"}

    def blocks(self, length: int) -> Blocks:
        return Blocks(length, "completion")


FAMILY = BlockDiffusion()
