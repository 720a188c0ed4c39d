"""DiffuGPT, a GPT-2 that attends in both directions, its logits one position to the left.

It was trained from GPT-2, and DiffuLLaMA from Llama 2 (arXiv 2410.17891). The weights keep GPT-2's
names but for two prefixes. A config.json that names GPT-2's own class says nothing of this: write
MODEL,family=diffugpt. DiffuLLaMA publishes a plain Llama: write MODEL,family=a2d,shift=1.
"""

from __future__ import annotations

from typing import Any

from transformers import GPT2Config, PretrainedConfig

from dlmctl.models.families import ModelFamily
from dlmctl.settings.small import SmallModel

BODY, EMBEDDING = ("denoise_model.", "transformer."), ("embed_tokens.", "transformer.wte.")
"""What names begin with: the authors' and GPT-2's."""

FIELDS = (
    "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function",
    "layer_norm_epsilon", "tie_word_embeddings",
)  # fmt: skip


class DiffuGPT(ModelFamily):
    classes = ("DiscreteDiffusionModel",)
    shift = 1
    lora_targets = ("c_attn", "c_proj", "c_fc")

    def rename(self, name: str) -> str:
        for theirs, ours in (BODY, EMBEDDING):
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name

    def original_name(self, name: str) -> str:
        for theirs, ours in (EMBEDDING, BODY):
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=4096,
            n_embd=small.hidden_size,
            n_layer=small.layers,
            n_head=small.heads,
            n_inner=small.intermediate_size,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=small.hidden_size**-0.5,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            is_causal=False,
        )

    def original_config(self, config: Any, special_ids: dict[str, Any]) -> dict[str, Any]:
        return {
            "architectures": ["DiscreteDiffusionModel"],
            "model_type": "gpt2",
            **{name: getattr(config, name) for name in FIELDS},
            **special_ids,
            "bos_token_id": special_ids["eos_token_id"],
        }


FAMILY = DiffuGPT()
