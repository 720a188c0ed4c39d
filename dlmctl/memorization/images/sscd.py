"""Descriptors of images that detect copies: SSCD (Pizzi et al. 2022, arXiv 2202.10261).

A ResNet-50, pooling by the generalized mean with exponent 3, a projection to 512 numbers, and unit
length. Somepalli et al. 2023 (arXiv 2212.03860) take the largest cosine between a sample's
descriptor and one of the training set, and call a sample with more than 0.5 a copy.

Images are rounded to bytes and fed as the authors of SSCD recommend: 288 pixels on the short side,
bilinear with antialiasing, mean and standard deviation of ImageNet. The trunk is that of
transformers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.memorization.images.image_bytes import rgb_bytes
from dlmctl.memorization.images.weights_file import load_exactly, read_state, sha256
from dlmctl.models.float32_products import whole_products
from dlmctl.records.errors import DataError

SHORT_SIDE = 288
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXPONENT = 3.0
LEAST = 1e-6
"""Smallest activation that the generalized mean takes."""
_BLOCK = re.compile(r"backbone\.layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(.+)")
_STEM = {
    "backbone.conv1.": "embedder.embedder.convolution.",
    "backbone.bn1.": "embedder.embedder.normalization.",
}


class SscdEncoder:
    """The network with weights that the user has."""

    def __init__(self, file: Path, device: torch.device) -> None:
        """Load the network.

        Raises:
            MissingInputError, DataError: as `read_state`; or these are weights of another network.
        """
        state = read_state(file)
        projection = state.get("backbone.fc.weight")
        if projection is None or projection.dim() != 2:
            raise DataError(
                "backbone.fc.weight is missing: these are no weights of SSCD in the names of "
                "torchvision (take the file that ends in .torchvision.pt)",
                str(file),
            )
        self.network = _Network(projection.shape[0])
        renamed = {transformers_name(name): tensor for name, tensor in state.items()}
        load_exactly(self.network, renamed, file, "SSCD's ResNet-50")
        self.network.to(device).float().eval()
        self.device = device
        self.about = {"sscd": str(file), "sscd_sha256": sha256(file)}

    @torch.no_grad()
    def __call__(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Descriptors, float32 [N, 512] of length 1 on the CPU, of images [N, C, H, W] in [-1, 1].

        Raises:
            UsageError: the images are vectors, or have other than 1 or 3 channels.
        """
        mean, std = (torch.tensor(each, device=self.device).view(3, 1, 1) for each in (MEAN, STD))
        features = []
        for part in rgb_bytes(images, "--sscd").split(batch_size):
            pixels = resized(part.to(self.device)) / 255
            with whole_products():
                features.append(self.network((pixels - mean) / std).cpu())
        return torch.cat(features)


class _Network(nn.Module):
    """Trunk, pooling and projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from transformers import ResNetConfig, ResNetModel

        self.trunk = ResNetModel(ResNetConfig())  # that of the class is ResNet-50
        self.projection = nn.Linear(self.trunk.config.hidden_sizes[-1], width)

    def forward(self, pixels: Tensor) -> Tensor:
        """float32 [B, width] of [B, 3, H, W]."""
        maps: Any = self.trunk(pixel_values=pixels).last_hidden_state  # [B, 2048, h, w]
        pooled = maps.clamp_min(LEAST).pow(EXPONENT).mean((2, 3)).pow(1 / EXPONENT)
        return functional.normalize(self.projection(pooled), dim=1)


def resized(pixels: Tensor) -> Tensor:
    """float32 [B, 3, h, w] in whole numbers, the shorter of h and w 288, of uint8 [B, 3, H, W]."""
    height, width = pixels.shape[2:]
    short = min(height, width)
    size = [SHORT_SIDE * side // short for side in (height, width)]
    scaled = functional.interpolate(
        pixels.float(), size, mode="bilinear", antialias=True, align_corners=False
    )
    return scaled.round().clamp(0, 255)


def transformers_name(name: str) -> str:
    """Name of a weight in `_Network`, of its name in the published file, which is torchvision's."""
    for old, new in _STEM.items():
        if name.startswith(old):
            return f"trunk.{new}{name.removeprefix(old)}"
    if name.startswith("backbone.fc."):
        return name.replace("backbone.fc.", "projection.")
    if not (parts := _BLOCK.fullmatch(name)):
        return name
    stage, layer, kind, number, rest = parts.groups()
    place = f"trunk.encoder.stages.{int(stage) - 1}.layers.{layer}."
    if kind == "downsample.":
        return f"{place}shortcut.{('convolution', 'normalization')[int(number)]}.{rest}"
    part = {"conv": "convolution", "bn": "normalization"}[kind]
    return f"{place}layer.{int(number) - 1}.{part}.{rest}"
