"""Stable-DiffCoder, a Llama that denoises block by block.

Blocks of 4 tokens are counted from the beginning of the text, and the last one ends with the
completion (arXiv 2601.15892). config.json is that of a Llama but for the name of the class.
"""

from __future__ import annotations

from dlmctl.models.families import Blocks, ModelFamily, Raw


class StableDiffCoder(ModelFamily):
    classes = ("StableDiffcoderForCausalLM",)
    pattern = "block-causal"
    mask_id = 5

    def block_length(self, raw: Raw, where: str) -> int | None:
        return super().block_length(raw, where) or 4

    def blocks(self, length: int) -> Blocks:
        return Blocks(length, whole_last=False)


FAMILY = StableDiffCoder()
