"""Small new vision-language models of the real architectures, for tests, examples and recipes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from dlmctl.models.policy import Policy
from dlmctl.models.small import text_sizes
from dlmctl.models.vision import vision_of
from dlmctl.records.errors import UsageError

VisionKind = Literal["qwen2.5-vl", "qwen3-vl", "llava"]
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
PATCH = {"qwen2.5-vl": 14, "qwen3-vl": 16, "llava": 14}
"""Pixels along one side of a patch, as published."""


def make_vision_policy(
    kind: VisionKind,
    tokenizer: Any,
    hidden_size: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate_size: int | None = None,
    sampling: dict[str, int] | None = None,
    seed: int = 0,
    image_size: int = 84,
) -> Policy:
    """A new vision-language model with random weights; both its halves have these sizes.

    Args:
        tokenizer: gets the special tokens that the kind needs.
        image_size: pixels along one side of LLaVA's images; Qwen takes any size.

    Raises:
        UsageError: the sizes do not fit each other.
    """
    if hidden_size % heads or (hidden_size // heads) % 4:
        raise UsageError(
            f"--hidden-size {hidden_size} is no multiple of 4 x --heads {heads}: rotary embeddings "
            "of two dimensions need heads of such a size"
        )
    torch.manual_seed(seed)
    marks = ["<image>"] if kind == "llava" else QWEN_TOKENS
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    text = text_sizes(tokenizer, hidden_size, layers, heads, intermediate_size)
    text |= {"num_key_value_heads": heads}
    sizes = {name: text[name] for name in ("hidden_size", "intermediate_size", "initializer_range")}
    model: Any
    if kind == "llava":
        model, processor = _llava(text, sizes, layers, heads, tokenizer, image_size)
    else:
        model, processor = _qwen(kind, text, sizes, layers, heads, tokenizer)
    return Policy(
        model=model.eval(),
        tokenizer=tokenizer,
        family="vlm",
        mask_id=None,
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        shift=1,
        vocab_size=len(tokenizer),
        name=f"new {kind}",
        revision="new",
        sampling=sampling or {},
        vision=vision_of(model.config.model_type, model.config, tokenizer, processor),
    )


def _qwen(
    kind: VisionKind,
    text: dict[str, Any],
    sizes: dict[str, Any],
    layers: int,
    heads: int,
    tokenizer: Any,
) -> tuple[Any, Any]:
    half = sizes["hidden_size"] // heads // 2
    side = 3 * half // 8
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half - 2 * side, side, side],
    }
    vision = {
        **sizes,
        "depth": layers,
        "num_heads": heads,
        "out_hidden_size": sizes["hidden_size"],
        "patch_size": PATCH[kind],
    }
    start, end, image, video = tokenizer.convert_tokens_to_ids(QWEN_TOKENS)
    ids = {
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "image_token_id": image,
        "video_token_id": video,
        "tie_word_embeddings": False,
    }
    model: Any
    if kind == "qwen2.5-vl":
        vision |= {"fullatt_block_indexes": [layers - 1]}
        config = Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope}, vision_config=vision, **ids
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
    else:
        rope = {**rope, "mrope_interleaved": True}
        text = {**text, "head_dim": 2 * half, "rope_parameters": rope}
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 12**2}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
        )
    size = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
    return model, Qwen2VLImageProcessorPil(patch_size=PATCH[kind], size=size)


def _llava(
    text: dict[str, Any],
    sizes: dict[str, Any],
    layers: int,
    heads: int,
    tokenizer: Any,
    image_size: int,
) -> tuple[Any, Any]:
    config = LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={
            "model_type": "clip_vision_model",
            **sizes,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": PATCH["llava"],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // PATCH["llava"]) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    side = {"height": image_size, "width": image_size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side)
    return LlavaForConditionalGeneration(config), processor
