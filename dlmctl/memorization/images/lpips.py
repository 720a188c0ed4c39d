"""Perceptual distance of two images: LPIPS (Zhang et al. 2018, arXiv 1801.03924), version 0.1.

With f_l the activations of a trunk after a rectifier, divided at each place by their norm over
channels (plus 1e-10), and w_l the weights of a head,

    d(x, y) = sum over l of the mean over places of w_l . (f_l(x) - f_l(y))^2

The trunk is torchvision's AlexNet or VGG16 in the names of its published files, of which the
classifier is not used; the heads are those of the package lpips. Images are rounded to bytes and
not resized. Which of the two trunks it is, is seen in the first weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlmctl.memorization.images.image_bytes import rgb_bytes
from dlmctl.memorization.images.weights_file import load_exactly, read_state, sha256
from dlmctl.models.float32_products import whole_products
from dlmctl.records.errors import DataError, UsageError

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of ImageNet in [-1, 1], as version 0.1 rounds them."""
LEAST = 1e-10
_FIRST = "features.0.weight"


class Layer(NamedTuple):
    """A convolution with a rectifier after it, or a maximum of stride 2."""

    channels: int
    """0 for a maximum."""
    size: int
    stride: int = 1
    padding: int = 0


class Trunk(NamedTuple):
    """The convolutions of a network, and where LPIPS looks."""

    name: str
    layers: tuple[Layer, ...]
    taps: tuple[int, ...]
    """Places of the rectifiers in torchvision's `features`."""
    smallest: int
    """Pixels of a side of the smallest image that reaches the last tap."""


def _three(count: int, width: int) -> list[Layer]:
    """Convolutions of 3 x 3 pixels that keep the size."""
    return [Layer(width, 3, 1, 1)] * count


_HALVED = Layer(0, 2)
ALEXNET = Trunk(
    "AlexNet",
    (
        *(Layer(64, 11, 4, 2), Layer(0, 3), Layer(192, 5, 1, 2), Layer(0, 3)),
        *(*_three(1, 384), *_three(2, 256)),
    ),
    (1, 4, 7, 9, 11),
    31,
)
VGG16 = Trunk(
    "VGG16",
    (
        *(*_three(2, 64), _HALVED, *_three(2, 128), _HALVED, *_three(3, 256), _HALVED),
        *(*_three(3, 512), _HALVED, *_three(3, 512)),
    ),
    (3, 8, 15, 22, 29),
    16,
)
_TRUNKS = {(64, 3, 11, 11): ALEXNET, (64, 3, 3, 3): VGG16}


class Lpips:
    """The distance with weights that the user has."""

    def __init__(self, file: Path, heads: Path, device: torch.device) -> None:
        """Load the network.

        Args:
            file: weights of the trunk.
            heads: weights of the heads.

        Raises:
            MissingInputError, DataError: as `read_state`; or these are weights of another network.
        """
        state = read_state(file)
        kind = _TRUNKS.get(tuple(state[_FIRST].shape)) if _FIRST in state else None
        if kind is None:
            raise DataError(
                f"its {_FIRST} is not that of AlexNet or VGG16 in the names of torchvision",
                str(file),
            )
        self.trunk, self.device = kind, device
        self.features = _convolutions(kind)
        kept = {k: v for k, v in state.items() if not k.startswith("classifier.")}
        load_exactly(_Named(features=self.features), kept, file, f"torchvision's {kind.name}")
        widths = [_width(self.features, tap) for tap in kind.taps]
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        named = {
            f"lin{n}": _Named(model=_Named(**{"1": each})) for n, each in enumerate(self.heads)
        }
        what = f"the heads of LPIPS for {kind.name}"
        load_exactly(_Named(**named), read_state(heads), heads, what)
        for part in (self.features, self.heads):
            part.to(device).float().eval()
        self.about = {
            "lpips_network": kind.name,
            "lpips_weights": str(file),
            "lpips_weights_sha256": sha256(file),
            "lpips_heads": str(heads),
            "lpips_heads_sha256": sha256(heads),
        }

    @torch.no_grad()
    def __call__(self, images: Tensor, others: Tensor, batch_size: int = 32) -> Tensor:
        """The distance of each image to the other at its place, float64 [N] on the CPU.

        Args:
            images, others: [N, C, H, W] in [-1, 1].

        Raises:
            UsageError: these are vectors, or images of other than 1 or 3 channels, or too small.
        """
        pairs = [rgb_bytes(each, "--lpips") for each in (images, others)]
        if min(images.shape[2:]) < self.trunk.smallest:
            size = " x ".join(map(str, images.shape[2:]))
            raise UsageError(
                f"--lpips with {self.trunk.name} takes images of at least {self.trunk.smallest} "
                f"pixels a side, not {size}"
            )
        distances = [
            self._distances(*(part.to(self.device) for part in parts))
            for parts in zip(*(each.split(batch_size) for each in pairs), strict=True)
        ]
        return torch.cat(distances)

    def _distances(self, x: Tensor, y: Tensor) -> Tensor:
        shift, scale = (
            torch.tensor(each, device=x.device).view(3, 1, 1) for each in (SHIFT, SCALE)
        )
        maps = (torch.cat([x, y]) / 127.5 - 1 - shift) / scale
        total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        heads = iter(self.heads)
        with whole_products():
            for place, layer in enumerate(self.features):
                maps = layer(maps)
                if place in self.trunk.taps:
                    norms = torch.linalg.vector_norm(maps, dim=1, keepdim=True)
                    of_x, of_y = (maps / (norms + LEAST)).chunk(2)
                    total += next(heads)((of_x - of_y).square()).mean((1, 2, 3)).double()
        return total.cpu()


class _Named(nn.Module):
    """Modules by name, whose weights are then named as in a published file."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def _convolutions(kind: Trunk) -> nn.Sequential:
    """Torchvision's `features` up to the last tap."""
    layers: list[nn.Module] = []
    width = 3
    for channels, size, stride, padding in kind.layers:
        if not channels:
            layers.append(nn.MaxPool2d(size, 2))
            continue
        layers += [nn.Conv2d(width, channels, size, stride, padding), nn.ReLU()]
        width = channels
    return nn.Sequential(*layers)


def _width(features: nn.Sequential, tap: int) -> int:
    """Channels of the convolution before a rectifier."""
    before = features[tap - 1]
    assert isinstance(before, nn.Conv2d)
    return before.out_channels
