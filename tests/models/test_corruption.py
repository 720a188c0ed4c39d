"""Corrupted images: what each kind does to pixels, and that tokens and places stay."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from conftest import tiny_vision_policy
from PIL import Image

from dlmctl.models.corruption import Corruption, corrupt, to_image, to_pixels
from dlmctl.models.policy import Policy

WIDTH, HEIGHT = 112, 84


@pytest.fixture(scope="module", params=["qwen2.5-vl", "llava"])
def policy(request) -> Policy:
    return tiny_vision_policy(request.param)


def picture_of(policy: Policy, pixels: np.ndarray):
    return policy.vision.picture(Image.fromarray(pixels))


@pytest.fixture(scope="module")
def picture(policy):
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return picture_of(policy, pixels)


def black(policy: Policy) -> torch.Tensor:
    processor = policy.vision.processor
    return -torch.tensor(processor.image_mean) / torch.tensor(processor.image_std)


def test_pixels_become_an_image_and_pixels_again(policy, picture):
    image = to_image(picture, policy.vision)
    assert torch.equal(to_pixels(image, picture, policy.vision), picture.pixels)


def test_the_image_is_the_image():
    """Qwen's rows of patches, put together, are what was given: nothing was resized."""
    policy = tiny_vision_policy("qwen2.5-vl")
    pixels = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    image = to_image(picture_of(policy, pixels), policy.vision)
    processor = policy.vision.processor
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    back = (image * std[:, None, None] + mean[:, None, None]) * 255
    assert np.abs(back.permute(1, 2, 0).numpy() - pixels).max() < 1e-2


@pytest.mark.parametrize("kind", get_args(Corruption))
def test_every_kind_keeps_the_shape_changes_pixels_and_is_repeatable(policy, picture, kind):
    made = corrupt(picture, policy.vision, kind, 0.6, 7)
    again = corrupt(picture, policy.vision, kind, 0.6, 7)
    assert made.pixels.shape == picture.pixels.shape
    assert (made.grid, made.tokens) == (picture.grid, picture.tokens)
    assert torch.equal(made.pixels, again.pixels)
    assert not torch.equal(made.pixels, picture.pixels)
    if kind in ("patch", "noise", "shuffle"):
        other = corrupt(picture, policy.vision, kind, 0.6, 8)
        assert not torch.equal(made.pixels, other.pixels)


def test_patches_are_whole_tokens_black_or_untouched(policy, picture):
    vision = policy.vision
    before = to_image(picture, vision)
    after = to_image(corrupt(picture, vision, "patch", 0.5, 3), vision)
    cell, found = vision.cell, []
    for top in range(0, before.shape[1], cell):
        for left in range(0, before.shape[2], cell):
            part = (slice(None), slice(top, top + cell), slice(left, left + cell))
            dark = torch.allclose(after[part], black(policy)[:, None, None].expand_as(after[part]))
            assert dark or torch.equal(after[part], before[part])
            found.append(dark)
    assert 0 < sum(found) < len(found)
    assert len(found) == picture.tokens


def test_probability_of_patches(policy, picture):
    assert torch.equal(corrupt(picture, policy.vision, "patch", 0.0, 3).pixels, picture.pixels)
    everything = to_image(corrupt(picture, policy.vision, "patch", 1.0, 3), policy.vision)
    assert torch.allclose(everything, black(policy)[:, None, None].expand_as(everything))
    blank = corrupt(picture, policy.vision, "blank", 0.0, 3)
    assert torch.allclose(to_image(blank, policy.vision), everything)


def test_blur_keeps_a_flat_image_and_lessens_contrast(policy, picture):
    flat = picture_of(policy, np.full((HEIGHT, WIDTH, 3), 77, dtype=np.uint8))
    assert torch.allclose(corrupt(flat, policy.vision, "blur", 0, 0).pixels, flat.pixels, atol=1e-5)
    before = to_image(picture, policy.vision)
    after = to_image(corrupt(picture, policy.vision, "blur", 0, 0), policy.vision)
    assert after.std() < 0.2 * before.std()


def test_noise_stays_within_black_and_white(policy, picture):
    image = to_image(corrupt(picture, policy.vision, "noise", 0, 1), policy.vision)
    processor = policy.vision.processor
    white = (1 - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
    assert (image >= black(policy)[:, None, None] - 1e-6).all()
    assert (image <= white[:, None, None] + 1e-6).all()


def test_shuffle_moves_squares_and_loses_none(policy, picture):
    vision = policy.vision

    def squares(pixels):
        image = to_image(pixels, vision)
        rows = image.unfold(1, vision.cell, vision.cell).unfold(2, vision.cell, vision.cell)
        return sorted(rows.permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1).sum(1).tolist())

    made = corrupt(picture, vision, "shuffle", 0, 5)
    assert squares(made) == pytest.approx(squares(picture), abs=1e-3)
