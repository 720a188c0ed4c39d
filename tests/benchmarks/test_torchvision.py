"""Prompts and pixels beside transformers' own processors, which need torchvision."""

from __future__ import annotations

import io
from base64 import b64decode
from typing import Any

import pytest
import torch
from conftest import noise_image, tiny_vision_policy
from PIL import Image

from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy

IMAGES = [noise_image(1), noise_image(2, 112, 56)]
RECORD = {"prompt": "3<image>4<image>?", "images": IMAGES}


@pytest.fixture(params=["qwen2.5-vl", "qwen3-vl", "llava"])
def policy(request: Any, tmp_path: Any) -> Policy:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    save_policy(tiny_vision_policy(request.param), tmp_path)
    return load_policy(str(tmp_path))


def stock(policy: Policy) -> dict[str, torch.Tensor]:
    """The record as transformers' processor of the family takes it."""
    import transformers

    vision = policy.vision
    assert vision is not None
    own = {"image_processor": vision.processor, "tokenizer": policy.tokenizer}
    processor: Any
    if vision.kind == "qwen2_5_vl":
        video = transformers.Qwen2VLVideoProcessor()
        processor = transformers.Qwen2_5_VLProcessor(**own, video_processor=video)
    elif vision.kind == "qwen3_vl":
        video = transformers.Qwen3VLVideoProcessor()
        processor = transformers.Qwen3VLProcessor(**own, video_processor=video)
    else:
        processor = transformers.LlavaProcessor(
            **own,
            patch_size=vision.patch,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    pictures = [Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))) for uri in IMAGES]
    text = str(RECORD["prompt"]).replace("<image>", vision.mark)
    return dict(processor(images=pictures, text=[text], return_tensors="pt"))


def test_prompts_and_pixels_are_those_of_the_stock_processor(policy):
    wanted = stock(policy)
    assert policy.encode(RECORD) == wanted["input_ids"][0].tolist()
    pictures = policy.pictures(RECORD)
    assert torch.equal(torch.cat([p.pixels for p in pictures]), wanted["pixel_values"])
    if "image_grid_thw" in wanted:
        assert [list(p.grid) for p in pictures] == wanted["image_grid_thw"].tolist()


def test_pixels_are_nearly_those_without_torchvision(policy, request):
    """Pillow and torchvision resize differently; what is not resized is the same."""
    assert "Pil" not in type(policy.vision.processor).__name__
    plain = tiny_vision_policy(request.node.callspec.params["policy"])
    for ours, theirs in zip(policy.pictures(RECORD), plain.pictures(RECORD), strict=True):
        assert (ours.grid, ours.tokens) == (theirs.grid, theirs.tokens)
        assert (ours.pixels - theirs.pixels).abs().mean() < 0.02
