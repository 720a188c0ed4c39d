"""Features of images are those of the model, fed as its preprocessor feeds it."""

from __future__ import annotations

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from dlmctl.memorization.images.image_encoder import ImageEncoder
from dlmctl.records.errors import DataError


@pytest.mark.parametrize(
    ("about", "edge"),
    [
        ({"crop_size": {"height": 32, "width": 32}, "size": {"shortest_edge": 40}}, 32),
        ({"crop_size": 32, "do_center_crop": False, "size": {"shortest_edge": 40}}, 64),
        ({"size": {"height": 32, "width": 32}}, 64),
        ({}, 64),
    ],
)
def test_a_model_is_fed_what_its_preprocessor_crops(tmp_path, about, edge):
    """DINOv2 names the size of its last training, 518, and is fed 224."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    about = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], **about}
    (tmp_path / "preprocessor_config.json").write_text(orjson.dumps(about).decode())
    images = torch.rand(2, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = (torch.tensor(about[n]).view(3, 1, 1) for n in ("image_mean", "image_std"))
    with torch.no_grad():
        wanted = model(pixel_values=((images + 1) / 2 - mean) / std).pooler_output
    found = ImageEncoder(tmp_path, torch.device("cpu"))(images)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_no_part_of_an_extractor_is_random(tmp_path):
    """A classifier has no pooler, which transformers would make up."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        image_size=16, patch_size=8,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    one, other = (ImageEncoder(tmp_path, torch.device("cpu"))(images) for _ in range(2))
    torch.testing.assert_close(one, other)
    file = tmp_path / "model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "attention" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"weights are missing, first .*attention"):
        ImageEncoder(tmp_path, torch.device("cpu"))
