"""Fast-dLLM v2, a Qwen2.5 that denoises block by block, its logits one position to the left.

The weights keep Qwen2's names (arXiv 2509.26328, NVlabs/Fast-dLLM). The first token of a block is
predicted by the last of the block before, and decided before the block is denoised; the rest in
parts of eight tokens. The authors' sampler takes that first token greedily at any temperature; here
it is sampled like the others, as its likelihood is asked for later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen2Config

from dlmctl.models.families import Blocks, ModelFamily, Raw, decoder_sizes, stock_config
from dlmctl.settings.small import SmallModel


class FastDllmV2(ModelFamily):
    model_types = ("fast_dllm_qwen",)
    classes = ("Fast_dLLM_QwenForCausalLM",)
    own_config = True
    pattern = "block-causal"
    mask_id = 151665
    sampling: Mapping[str, Any] = {"sub_block_length": 8}
    shift = 1

    def config(self, raw: Raw, where: str) -> PretrainedConfig:
        return stock_config({**raw, "model_type": "qwen2"}, where)

    def blocks(self, length: int) -> Blocks:
        return Blocks(length, first_alone=True)

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        return Qwen2Config(**decoder_sizes(small, tokenizer), is_causal=False)


FAMILY = FastDllmV2()
