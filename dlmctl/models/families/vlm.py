"""Vision-language models: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA, left to right."""

from __future__ import annotations

from typing import Any

from transformers import LlavaConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen3VLConfig

from dlmctl.models.families import ModelFamily, decoder_sizes
from dlmctl.settings.small import SmallModel

VARIANTS = ("qwen2.5-vl", "qwen3-vl", "llava")

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]

PATCH = {"qwen2.5-vl": 14, "qwen3-vl": 16, "llava": 14}
"""Pixels along one side of a patch, as published."""
LLAVA_IMAGE = 84
"""Pixels along one side of the images of a small LLaVA; Qwen takes any size."""


class VisionLanguage(ModelFamily):
    model_types = (*QWEN, "llava")
    auto_class = "AutoModelForImageTextToText"
    takes_images = True
    diffusion = False
    pattern = "causal"
    shift = 1
    reuses_keys = False
    language_layers = "language_model.layers"
    head_size_multiple = 4
    """Rotary embeddings of two dimensions need heads of such a size."""
    title = "vision-language model"

    def image_layout(self, config: Any, tokenizer: Any) -> dict[str, Any]:
        image_id, patch = int(config.image_token_id), config.vision_config.patch_size
        if config.model_type in QWEN:
            return {
                "mark": QWEN_MARK,
                "banned": (image_id, int(config.video_token_id)),
                "grid": True,
                "merge": config.vision_config.spatial_merge_size,
                "patch": patch,
                "marks": frozenset(tokenizer.encode(QWEN_MARK, add_special_tokens=False)),
            }
        return {
            "mark": str(tokenizer.convert_ids_to_tokens(image_id)),
            "banned": (image_id,),
            "patch": patch,
            "extra": int(config.vision_feature_select_strategy == "full"),
            "marks": frozenset([image_id]),
        }

    def new_config(self, small: SmallModel, tokenizer: Any) -> PretrainedConfig:
        """Both halves of the model have the same sizes."""
        tokens = ["<image>"] if small.family == "llava" else QWEN_TOKENS
        tokenizer.add_special_tokens({"extra_special_tokens": tokens})
        ids, text = tokenizer.convert_tokens_to_ids(tokens), decoder_sizes(small, tokenizer)
        tower = {
            name: text[name] for name in ("hidden_size", "intermediate_size", "initializer_range")
        }
        tower |= {"patch_size": PATCH[small.family]}
        make = _llava_config if small.family == "llava" else _qwen_config
        return make(small, text, tower, ids)

    def new_processor(self, config: Any) -> Any:
        from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil

        if config.model_type in QWEN:
            size = {"shortest_edge": 56 * 56, "longest_edge": 1280 * 28 * 28}
            return Qwen2VLImageProcessorPil(patch_size=config.vision_config.patch_size, size=size)
        side = config.vision_config.image_size
        crop = {"height": side, "width": side}
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)


def _qwen_config(
    small: SmallModel, text: dict[str, Any], tower: dict[str, Any], ids: list[int]
) -> PretrainedConfig:
    half = small.hidden_size // small.heads // 2
    side = 3 * half // 8
    rope = {
        "rope_type": "default",
        "rope_theta": 1e6,
        "mrope_section": [half - 2 * side, side, side],
    }
    tower |= {"depth": small.layers, "num_heads": small.heads, "out_hidden_size": small.hidden_size}
    if small.family == "qwen2.5-vl":
        kind: Any = Qwen2_5_VLConfig
        tower |= {"fullatt_block_indexes": [small.layers - 1]}
        text |= {"rope_parameters": rope}
    else:
        kind = Qwen3VLConfig
        tower |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 12**2}
        text |= {"head_dim": 2 * half, "rope_parameters": {**rope, "mrope_interleaved": True}}
    config: PretrainedConfig = kind(
        text_config=text,
        vision_config=tower,
        vision_start_token_id=ids[0],
        vision_end_token_id=ids[1],
        image_token_id=ids[2],
        video_token_id=ids[3],
        tie_word_embeddings=False,
    )
    return config


def _llava_config(
    small: SmallModel, text: dict[str, Any], tower: dict[str, Any], ids: list[int]
) -> PretrainedConfig:
    tower |= {"num_hidden_layers": small.layers, "num_attention_heads": small.heads}
    return LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", "image_size": LLAVA_IMAGE, **tower},
        image_token_id=ids[0],
        image_seq_length=(LLAVA_IMAGE // PATCH["llava"]) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


FAMILY = VisionLanguage()
