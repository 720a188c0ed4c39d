"""Images as a vision-language model takes them: placeholder tokens, pixels, positions.

A prompt has the text `<image>` where an image goes. The model's own marks replace it, and the
placeholder among them is repeated for each token of the image. Pixels are kept for each sequence,
so that a batch may contain any images in any order. Models take images in one of two layouts:

    grid     Qwen2-VL, Qwen2.5-VL, Qwen3-VL: rows of 14-pixel patches (16 in Qwen3-VL), 2 x 2 of
             which are one token; positions in three dimensions (M-RoPE)
    square   LLaVA: one square of pixels per image, one token per patch

The image processor is the one that the checkpoint names: torchvision's if that is installed,
Pillow's otherwise. The processors that combine it with a tokenizer are not needed, and those of
Qwen cannot be imported without torchvision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.families import ModelFamily
from dlmctl.records.errors import DataError, reason_of
from dlmctl.tasks.image_columns import MARK as IMAGE_MARK
from dlmctl.tasks.images import image_hash, image_sources, load_image, record_folder

REMEMBERED = 64
"""Images whose pixels are kept, so that the samples of a prompt share one decoding."""


class Picture(NamedTuple):
    """One image as a model takes it."""

    pixels: Tensor
    """float32: [rows, features] in a grid, [1, 3, H, W] as a square."""
    grid: tuple[int, int, int] | None
    """Patches in time, height and width; None for a square."""
    tokens: int
    """Number of its placeholders in a sequence."""
    digest: str
    """Hash of the original image."""


@dataclass(frozen=True)
class Vision:
    """How a policy takes images."""

    processor: Any
    """The image processor of transformers."""
    kind: str
    """The `model_type`."""
    image_id: int
    """The placeholder token."""
    mark: str
    """Text of an image in a prompt without a chat template."""
    banned: tuple[int, ...]
    """Placeholders of images and videos, which must not be sampled: the next pass would look for
    features that do not exist."""
    grid: bool = False
    """Images come as a grid of patches; otherwise as squares."""
    merge: int = 1
    """Patches per token, along one side."""
    patch: int = 14
    """Pixels per patch, along one side."""
    extra: int = 0
    """Tokens of an image in addition to those of its patches."""
    marks: frozenset[int] = frozenset()
    """The tokens of `mark`, which occur in a prompt only for an image."""
    alter: Callable[[Mapping[str, Any], int, Picture], Picture] | None = None
    """Changes a picture, given its record and its number there."""
    left_out: bool = False
    """Images are left out of prompts, and so are their marks."""
    _seen: OrderedDict[bytes, Picture] = field(default_factory=OrderedDict, repr=False)

    @property
    def cell(self) -> int:
        """Pixels per token, along one side."""
        return self.patch * self.merge

    def pictures(self, record: Mapping[str, Any]) -> list[Picture]:
        """The images of a record, in order; raises DataError if one cannot be used."""
        if self.left_out:
            return []
        folder = record_folder(getattr(record, "where", ""))
        pictures = [self._remembered(source, folder) for source in image_sources(record)]
        if self.alter is None:
            return pictures
        return [self.alter(record, number, picture) for number, picture in enumerate(pictures)]

    def _remembered(self, source: Any, folder: str) -> Picture:
        if not isinstance(source, str):
            return self.picture(load_image(source, folder))
        key = blake2b(f"{folder}\0{source}".encode(), digest_size=16).digest()
        if key not in self._seen:
            self._seen[key] = self.picture(load_image(source, folder))
            if len(self._seen) > REMEMBERED:
                self._seen.popitem(last=False)
        self._seen.move_to_end(key)
        return self._seen[key]

    def picture(self, image: Any) -> Picture:
        """A Pillow image, resized and normalized as the model was trained with."""
        try:
            inputs = self.processor(images=[image], return_tensors="pt")
        except ValueError as error:  # an aspect ratio that Qwen refuses
            raise DataError(f"the image cannot be used ({reason_of(error)})") from None
        pixels = inputs["pixel_values"].float()
        digest = image_hash(image)
        if self.grid:
            time, height, width = inputs["image_grid_thw"][0].tolist()
            return Picture(
                pixels, (time, height, width), time * height * width // self.merge**2, digest
            )
        height, width = (side // self.patch for side in pixels.shape[-2:])
        return Picture(pixels, None, height * width + self.extra, digest)

    def expand(self, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        """Ids with each placeholder repeated for its image.

        Raises:
            DataError: the numbers of placeholders and of images differ.
        """
        if self.left_out:
            return self.without_images(ids)
        placeholders = sum(i == self.image_id for i in ids)
        if placeholders != len(pictures):
            raise DataError(
                f"the prompt has {placeholders} places for images, and the record "
                f"{len(pictures)} images"
            )
        counts = iter([picture.tokens for picture in pictures])
        return [token for i in ids for token in ([i] * next(counts) if i == self.image_id else [i])]

    def without_images(self, ids: Sequence[int]) -> list[int]:
        """A prompt without its images."""
        return [token for token in ids if token not in self.marks]

    def inputs(
        self, core: Any, pictures: Sequence[Sequence[Picture]], device: torch.device
    ) -> dict[str, Any]:
        """The model's arguments for the pictures of each row.

        A picture that several rows share, as the samples of a prompt do, is encoded once.
        """
        flat = [picture for row in pictures for picture in row]
        if not flat:
            return {}
        numbers: dict[int, int] = {}
        order = [numbers.setdefault(id(picture.pixels), len(numbers)) for picture in flat]
        if len(numbers) == len(flat) or not _takes_features(core):
            return self._pixels(flat, device)
        once = [flat[order.index(number)] for number in range(len(numbers))]
        features = core.model.get_image_features(**self._pixels(once, device), return_dict=True)
        features.pooler_output = [features.pooler_output[number] for number in order]
        if getattr(features, "deepstack_features", None) is not None:
            features.deepstack_features = [
                [layer[number] for number in order] for layer in features.deepstack_features
            ]
        return {"mm_encoder_outputs": {"image": features}}

    def _pixels(self, pictures: Sequence[Picture], device: torch.device) -> dict[str, Any]:
        inputs = {"pixel_values": torch.cat([p.pixels for p in pictures]).to(device)}
        if self.grid:
            inputs["image_grid_thw"] = torch.tensor([p.grid for p in pictures], device=device)
        return inputs

    def positions(
        self,
        core: Any,
        ids: Tensor,
        attention: Tensor | None,
        pictures: Sequence[Sequence[Picture]],
    ) -> Tensor | None:
        """Positions of the tokens, int64 [3, B, T] in time, height and width.

        None if they count from 0 on. Tokens that attention leaves out take up no position.

        Args:
            ids: int64 [B, T].
            attention: bool or int64 [B, T], or None.
        """
        if not self.grid or not any(pictures):
            return None
        present = torch.ones_like(ids) if attention is None else attention.long()  # [B, T]
        positions = (present.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1).clone()  # [3, B, T]
        rows = torch.tensor([n for n, row in enumerate(pictures) if row], device=ids.device)  # [R]
        row_pictures = [pictures[n] for n in rows.tolist()]
        end = int((ids[rows] == self.image_id).any(0).nonzero()[-1]) + 1  # of the last image, E
        begin = self._positions_up_to(core, ids[rows, :end], present[rows, :end], row_pictures)
        after = begin.amax(dim=(0, 2))[:, None] + present[rows, end:].cumsum(1)  # [R, T - E]
        positions[:, rows] = torch.cat([begin, after.expand(3, -1, -1)], dim=2)
        return positions

    def _positions_up_to(
        self, core: Any, ids: Tensor, present: Tensor, pictures: Sequence[Sequence[Picture]]
    ) -> Tensor:
        """Positions int64 [3, R, E] from transformers, which takes a while for each row.

        The samples of a prompt are equal up to their last image, so each prompt is computed once.
        """
        keys = [
            (*numbers, *(picture.grid for picture in row))
            for numbers, row in zip(torch.cat([ids, present], 1).tolist(), pictures, strict=True)
        ]
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        distinct = list(first.values())  # rows, one for each prompt
        positions, _ = core.model.get_rope_index(
            ids[distinct],
            mm_token_type_ids=(ids[distinct] == self.image_id).int(),
            image_grid_thw=torch.tensor([p.grid for n in distinct for p in pictures[n]]),
            attention_mask=present[distinct],
        )
        numbers = {key: number for number, key in enumerate(first)}
        return positions[:, [numbers[key] for key in keys]]


def _takes_features(core: Any) -> bool:
    """Whether this version of transformers accepts features of images that are already encoded."""
    return "mm_encoder_outputs" in signature(core.model.forward).parameters


def vision_of(family: ModelFamily, config: Any, tokenizer: Any, processor: Any) -> Vision:
    """How a model of a family that takes images takes them.

    Args:
        config, processor: of transformers; the processor is that of images.

    Raises:
        DataError: the tokenizer lacks the placeholder that config.json names.
    """
    image_id = int(config.image_token_id)
    if image_id >= len(tokenizer):
        raise DataError(f"image_token_id {image_id} of config.json is no token of its tokenizer")
    layout = family.image_layout(config, tokenizer)
    return Vision(processor, config.model_type, image_id, **layout)


def image_parts(text: str) -> list[dict[str, str]]:
    """The parts of a chat message for a text with image marks."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
