"""Features of images are those of the model, fed as its preprocessor feeds it."""

from __future__ import annotations

import copy
import math

import orjson
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTForImageClassification

from dlmctl.memorization.images.image_encoder import ImageEncoder
from dlmctl.models.weights import weights_hash
from dlmctl.records.errors import DataError


def cubic(edge: int, side: int) -> torch.Tensor:
    """float64 [edge, side]: weights that resample `side` points to `edge` as DINOv2's code does.

    Keys' cubic with a = -0.75; a step is side / (edge + 0.1), and points beyond the ends are the
    last ones.
    """
    weights = torch.zeros(edge, side, dtype=torch.float64)
    for number in range(edge):
        at = (number + 0.5) * side / (edge + 0.1) - 0.5
        for point in range(math.floor(at) - 1, math.floor(at) + 3):
            t = abs(at - point)
            near = 1.25 * t**3 - 2.25 * t**2 + 1
            far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
            weights[number, min(max(point, 0), side - 1)] += near if t <= 1 else far
    return weights


def class_tokens(model: Dinov2Model, pixels: torch.Tensor) -> torch.Tensor:
    """The normalized class token, with positions resampled by hand."""
    model = copy.deepcopy(model)
    old = model.embeddings.position_embeddings.data.double()
    side, edge = round((old.shape[1] - 1) ** 0.5), pixels.shape[-1] // model.config.patch_size
    if edge != side:
        grid = old[0, 1:].view(side, side, -1)
        weights = cubic(edge, side)
        new = torch.einsum("ai,bj,ijd->abd", weights, weights, grid).flatten(0, 1)
        positions = torch.cat([old[0, :1], new])[None].float()
        model.embeddings.position_embeddings = torch.nn.Parameter(positions)
    with torch.no_grad():
        return model(pixel_values=pixels).last_hidden_state[:, 0]


def test_dinov2_is_fed_as_published_whatever_its_folder_says(tmp_path):
    """224 pixels, ImageNet's normalization, the class token; `config.json` says 518."""
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14,
    )  # fmt: skip
    model = Dinov2Model(config).eval()
    positions = torch.randn(model.embeddings.position_embeddings.shape)
    model.embeddings.position_embeddings.data = positions
    model.save_pretrained(tmp_path)
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = ((images + 1) / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    encoder = ImageEncoder(tmp_path, torch.device("cpu"))
    found, wanted = encoder(images), class_tokens(model, pixels)
    torch.testing.assert_close(found, wanted, rtol=0, atol=5e-6)
    # transformers' own resampling is another.
    with torch.no_grad():
        assert (model(pixel_values=pixels).pooler_output - wanted).abs().max() > 1e-4
    assert encoder.about["extractor_size"] == "224x224"
    assert encoder.about["extractor_revision"] == weights_hash([tmp_path / "model.safetensors"])


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
    wanted = class_tokens(model, ((images + 1) / 2 - mean) / std)
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
