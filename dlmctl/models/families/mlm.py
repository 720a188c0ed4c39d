"""Masked language models: BERT, RoBERTa, ModernBERT, DistilBERT (a new one is a BERT).

They are denoisers already.
"""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, PretrainedConfig

from dlmctl.models.families import ModelFamily, decoder_sizes
from dlmctl.settings.small import SmallModel


class MaskedLM(ModelFamily):
    classes = ("*ForMaskedLM",)
    auto_class = "AutoModelForMaskedLM"
    ignored_weights = ("cls.seq_relationship.", "bert.pooler.")
    """BERT's parts for guessing whether one sentence follows another."""
    pattern = None
    reuses_keys = False
    fallback_end = "sep_token"

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        sizes = decoder_sizes(small, tokenizer) | {"tie_word_embeddings": True}
        del sizes["num_key_value_heads"]
        return BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


FAMILY = MaskedLM()
