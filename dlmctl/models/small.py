"""Small new models of every family, for tests, examples and recipes."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from dlmctl.models.architecture import family_named
from dlmctl.models.policy import Policy
from dlmctl.models.vision import vision_of
from dlmctl.records.errors import UsageError
from dlmctl.settings.families import family_of_variant
from dlmctl.settings.small import SmallModel

BLOCK_LENGTH = 4
"""Of a new block-causal model, if none is given."""


def make_policy(small: SmallModel, tokenizer: Any, seed: int = 0) -> Policy:
    """A new model with random weights.

    Args:
        tokenizer: gets the special tokens that a vision-language model needs.

    Raises:
        UsageError: the sizes do not fit each other.
    """
    family = family_named(family_of_variant(small.family))
    multiple = family.head_size_multiple
    if small.hidden_size % small.heads or (small.hidden_size // small.heads) % multiple:
        raise UsageError(
            f"--hidden-size {small.hidden_size} is not a multiple of {multiple} x --heads "
            f"{small.heads}: rotary embeddings need heads of such a size"
        )
    blocks = None
    if family.pattern == "block-causal":
        blocks = family.blocks(small.block_length or BLOCK_LENGTH)
    config = family.new_config(small, tokenizer)
    torch.manual_seed(seed)
    auto: Any = getattr(transformers, family.auto_class)
    model: Any = auto._model_mapping[type(config)](config)
    vision = None
    if family.takes_images:
        vision = vision_of(family, config, tokenizer, family.new_processor(config))
    return Policy(
        model=model.eval(),
        tokenizer=tokenizer,
        family=family.name,
        mask_id=tokenizer.mask_token_id if family.diffusion else None,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        shift=family.shift,
        vocab_size=len(tokenizer),
        name=f"new {small.family}",
        revision="new",
        sampling={**family.sampling, **small.sampling},
        blocks=blocks,
        vision=vision,
    )
