"""Corrupted images, for the visual contrast: same size, same tokens, less to see.

Images are corrupted after they are resized, so that grid, placeholders and positions stay the same
and one sequence of tokens serves both passes. `patch` blackens whole tokens (2 x 2 patches in
Qwen); squares drawn on the original image, as in PAPO and VPPO, do not line up with tokens.

    patch     each token's square is black with probability p           (PAPO, VPPO: p 0.6, 0.5)
    blank     the whole image is black
    blur      Gaussian blur; its radius is the standard deviation       (VPPO: 6 pixels)
    noise     Gaussian noise of standard deviation 189 of 255           (VPPO)
    shuffle   the squares of the tokens in a different order

With `no-image` the prompt loses its images and their marks, so there is nothing to corrupt, and
the tokens that follow move up.

Black is black before normalization; zeros in normalized pixels would be grey. The strengths are
those of the cited code; which of these SRPO uses could not be determined.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.models.vision import Picture, Vision

Corruption = Literal["patch", "blank", "blur", "noise", "shuffle"]
NO_IMAGE: Literal["no-image"] = "no-image"
Unseen = Corruption | Literal["no-image"]
"""Values of --corrupt."""

BLUR_PIXELS = 6.0
NOISE = 189 / 255


def corrupt(
    picture: Picture, vision: Vision, kind: Corruption, probability: float, seed: int
) -> Picture:
    """The corrupted picture; for the same seed the same on every machine.

    Args:
        probability: p of `patch`.
        seed: 64 bits.
    """
    # manual_seed wants it below 2**63.
    generator = torch.Generator().manual_seed(seed & (2**63 - 1))
    image = to_image(picture, vision)
    low, high = _range(vision.processor)
    if kind == "patch":
        cells = torch.rand(_cells(image, vision.cell), generator=generator) < probability
        mask = cells.repeat_interleave(vision.cell, 0).repeat_interleave(vision.cell, 1)
        corrupted = torch.where(mask, low[:, None, None], image)
    elif kind == "blank":
        corrupted = low[:, None, None].expand_as(image)
    elif kind == "blur":
        corrupted = _blurred(image, BLUR_PIXELS)
    elif kind == "noise":
        noise = torch.randn(image.shape, generator=generator)
        noisy = image + NOISE * (high - low)[:, None, None] * noise
        corrupted = torch.minimum(torch.maximum(noisy, low[:, None, None]), high[:, None, None])
    else:
        corrupted = _shuffled(image, vision.cell, generator)
    return picture._replace(pixels=to_pixels(corrupted, picture, vision))


def to_image(picture: Picture, vision: Vision) -> Tensor:
    """Pixels as an image: float32 [3, H, W], normalized."""
    if picture.grid is None:
        return picture.pixels[0]
    rows = picture.pixels.unflatten(1, (3, -1, vision.patch, vision.patch))[:, :, 0]
    _, height, width = picture.grid
    m, p = vision.merge, vision.patch
    cells = rows.reshape(height // m, width // m, m, m, 3, p, p)
    return cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * p, width * p)


def to_pixels(image: Tensor, picture: Picture, vision: Vision) -> Tensor:
    """The inverse of `to_image`, in the layout of the picture."""
    if picture.grid is None:
        return image[None].contiguous()
    _, height, width = picture.grid
    m, p = vision.merge, vision.patch
    cells = image.reshape(3, height // m, m, p, width // m, m, p).permute(1, 4, 2, 5, 0, 3, 6)
    frames = picture.pixels.shape[1] // (3 * p * p)
    rows = cells.reshape(height * width, 3, 1, p, p).expand(-1, -1, frames, -1, -1)
    return rows.reshape(height * width, -1)


def _cells(image: Tensor, cell: int) -> tuple[int, int]:
    return math.ceil(image.shape[1] / cell), math.ceil(image.shape[2] / cell)


def _range(processor: Any) -> tuple[Tensor, Tensor]:
    """Black and white after normalization: float32 [3] each."""
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return -mean / std, (1 - mean) / std


def _blurred(image: Tensor, deviation: float) -> Tensor:
    """Gaussian blur with repeated edges: a kernel for rows, then one for columns."""
    reach = math.ceil(3 * deviation)
    distance = torch.arange(-reach, reach + 1, dtype=image.dtype)
    kernel = torch.exp(-(distance**2) / (2 * deviation**2))
    kernel /= kernel.sum()
    padded = functional.pad(image[:, None], (reach, reach, 0, 0), mode="replicate")
    rows = functional.conv2d(padded, kernel[None, None, None, :])
    padded = functional.pad(rows, (0, 0, reach, reach), mode="replicate")
    return functional.conv2d(padded, kernel[None, None, :, None])[:, 0]


def _shuffled(image: Tensor, cell: int, generator: torch.Generator) -> Tensor:
    """Squares in a different order; pixels beyond the grid of squares stay."""
    height, width = image.shape[1] // cell, image.shape[2] // cell
    inner = image[:, : height * cell, : width * cell]
    squares = inner.reshape(3, height, cell, width, cell).permute(1, 3, 0, 2, 4)
    order = torch.randperm(height * width, generator=generator)
    squares = squares.flatten(0, 1)[order].reshape(height, width, 3, cell, cell)
    shuffled = image.clone()
    moved = squares.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)
    shuffled[:, : height * cell, : width * cell] = moved
    return shuffled
