"""Images as a vision-language model takes them: placeholder tokens, pixels, positions.

A prompt has the text `<image>` where an image goes. The model's own marks take its place, and the
placeholder among them is repeated as often as the image has tokens. The pixels are sliced for each
sequence, so that a batch may hold any images in any order.

    qwen2_vl, qwen2_5_vl, qwen3_vl   rows of 14-pixel patches (16 in Qwen3-VL), 2 x 2 of them one
                                     token; places in three dimensions (M-RoPE)
    llava                            one square of pixels per image, one token per patch

The image processor is the one that the checkpoint names: torchvision's where that is installed,
Pillow's otherwise. The processors that join it with a tokenizer are not needed, and those of Qwen
cannot even be imported without torchvision.
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

from dlmctl.records.errors import DataError
from dlmctl.tasks.image_columns import MARK as IMAGE_MARK
from dlmctl.tasks.images import image_hash, image_sources, load_image, record_folder

QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
KINDS = (*QWEN, "llava")
"""Values of `model_type` that are read as vision-language models."""
REMEMBERED = 64
"""Images that are kept as pixels, so that the samples of a prompt share one decoding."""


class Picture(NamedTuple):
    """One image as a model takes it."""

    pixels: Tensor
    """float32: [rows, features] for Qwen, [1, 3, H, W] otherwise."""
    grid: tuple[int, int, int] | None
    """Patches in time, height and width, for Qwen."""
    tokens: int
    """Placeholders that it takes in a sequence."""
    digest: str
    """Hash of the image itself."""


@dataclass(frozen=True)
class Vision:
    """What a policy knows of images."""

    processor: Any
    """Of images, from transformers."""
    kind: str
    """The `model_type`."""
    image_id: int
    """The placeholder token."""
    mark: str
    """Text of an image in a prompt that goes through no chat template."""
    banned: tuple[int, ...]
    """Placeholders of images and videos, which must not be sampled: the next pass would look for
    features that are not there."""
    merge: int = 1
    """Patches that one token stands for, along one side."""
    patch: int = 14
    """Pixels of a patch, along one side."""
    extra: int = 0
    """Tokens that an image has beside those of its patches."""
    marks: frozenset[int] = frozenset()
    """The tokens of `mark`, which stand in a prompt only where an image does."""
    alter: Callable[[Mapping[str, Any], int, Picture], Picture] | None = None
    """What is done to the pictures of a record, by record and number."""
    hidden: bool = False
    """Images are left out of prompts, marks and all."""
    _seen: OrderedDict[bytes, Picture] = field(default_factory=OrderedDict, repr=False)

    @property
    def cell(self) -> int:
        """Pixels that one token stands for, along one side."""
        return self.patch * self.merge

    def pictures(self, record: Mapping[str, Any]) -> list[Picture]:
        """The images of a record, in order; raises DataError where one cannot be used."""
        if self.hidden:
            return []
        folder = record_folder(getattr(record, "where", ""))
        made = [self._remembered(source, folder) for source in image_sources(record)]
        if self.alter is None:
            return made
        return [self.alter(record, number, picture) for number, picture in enumerate(made)]

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
            made = self.processor(images=[image], return_tensors="pt")
        except ValueError as error:  # an aspect ratio that Qwen refuses
            raise DataError(f"the image cannot be used ({str(error).splitlines()[0]})") from None
        pixels = made["pixel_values"].float()
        digest = image_hash(image)
        if self.kind in QWEN:
            time, height, width = made["image_grid_thw"][0].tolist()
            return Picture(
                pixels, (time, height, width), time * height * width // self.merge**2, digest
            )
        height, width = (side // self.patch for side in pixels.shape[-2:])
        return Picture(pixels, None, height * width + self.extra, digest)

    def expand(self, ids: Sequence[int], pictures: Sequence[Picture]) -> list[int]:
        """Ids with each placeholder repeated for its image; raises DataError on a wrong number."""
        if self.hidden:
            return self.without_images(ids)
        found = sum(i == self.image_id for i in ids)
        if found != len(pictures):
            raise DataError(
                f"the prompt has {found} places for images, and the record {len(pictures)} images"
            )
        counts = iter([picture.tokens for picture in pictures])
        return [token for i in ids for token in ([i] * next(counts) if i == self.image_id else [i])]

    def without_images(self, ids: Sequence[int]) -> list[int]:
        """A prompt as it is where there is no image in it."""
        return [token for token in ids if token not in self.marks]

    def inputs(
        self, core: Any, pictures: Sequence[Sequence[Picture]], device: torch.device
    ) -> dict[str, Any]:
        """What the model is given beside the ids, for the pictures of each row.

        A picture that several rows share, as the samples of a prompt do, is looked at once.
        """
        flat = [picture for row in pictures for picture in row]
        if not flat:
            return {}
        numbers: dict[int, int] = {}
        order = [numbers.setdefault(id(picture.pixels), len(numbers)) for picture in flat]
        if len(numbers) == len(flat) or not _takes_features(core):
            return self._pixels(flat, device)
        once = [flat[order.index(number)] for number in range(len(numbers))]
        seen = core.model.get_image_features(**self._pixels(once, device), return_dict=True)
        seen.pooler_output = [seen.pooler_output[number] for number in order]
        if getattr(seen, "deepstack_features", None) is not None:
            seen.deepstack_features = [
                [layer[number] for number in order] for layer in seen.deepstack_features
            ]
        return {"mm_encoder_outputs": {"image": seen}}

    def _pixels(self, pictures: Sequence[Picture], device: torch.device) -> dict[str, Any]:
        given = {"pixel_values": torch.cat([p.pixels for p in pictures]).to(device)}
        if self.kind in QWEN:
            given["image_grid_thw"] = torch.tensor([p.grid for p in pictures], device=device)
        return given

    def places(
        self,
        core: Any,
        ids: Tensor,
        attention: Tensor | None,
        pictures: Sequence[Sequence[Picture]],
    ) -> Tensor | None:
        """Where tokens stand: int64 [3, B, T] in time, height and width; None where they count on.

        Tokens that attention leaves out take up no place, as if they were not there.

        Args:
            ids: int64 [B, T].
            attention: bool or int64 [B, T], or None.
        """
        if self.kind not in QWEN or not any(pictures):
            return None
        there = torch.ones_like(ids) if attention is None else attention.long()
        made = (there.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1).clone()
        rows = torch.tensor([n for n, row in enumerate(pictures) if row], device=ids.device)
        seen = [pictures[n] for n in rows.tolist()]
        end = int((ids[rows] == self.image_id).any(0).nonzero()[-1]) + 1
        begin = self._places_up_to(core, ids[rows, :end], there[rows, :end], seen)
        behind = begin.amax(dim=(0, 2))[:, None] + there[rows, end:].cumsum(1)
        made[:, rows] = torch.cat([begin, behind.expand(3, -1, -1)], dim=2)
        return made

    def _places_up_to(
        self, core: Any, ids: Tensor, there: Tensor, pictures: Sequence[Sequence[Picture]]
    ) -> Tensor:
        """int64 [3, B, T] as transformers has them, which takes a while for each row.

        The samples of a prompt are the same up to their last image, and are asked about once.
        """
        keys = [
            (*given, *(picture.grid for picture in row))
            for given, row in zip(torch.cat([ids, there], 1).tolist(), pictures, strict=True)
        ]
        first = {key: n for n, key in reversed(list(enumerate(keys)))}
        one = list(first.values())
        places, _ = core.model.get_rope_index(
            ids[one],
            mm_token_type_ids=(ids[one] == self.image_id).int(),
            image_grid_thw=torch.tensor([p.grid for n in one for p in pictures[n]]),
            attention_mask=there[one],
        )
        numbers = {key: number for number, key in enumerate(first)}
        return places[:, [numbers[key] for key in keys]]


def _takes_features(core: Any) -> bool:
    """Whether this version of transformers lets us look at images ourselves."""
    return "mm_encoder_outputs" in signature(core.model.forward).parameters


def vision_of(kind: str, config: Any, tokenizer: Any, processor: Any) -> Vision:
    """What a model of this kind does with images.

    Args:
        config: of transformers.
        processor: of images, from transformers.

    Raises:
        DataError: the tokenizer lacks the placeholder that config.json names.
    """
    image_id = int(config.image_token_id)
    if image_id >= len(tokenizer):
        raise DataError(f"image_token_id {image_id} of config.json is no token of its tokenizer")
    if kind in QWEN:
        banned = (image_id, int(config.video_token_id))
        merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
        marks = frozenset(tokenizer.encode(QWEN_MARK, add_special_tokens=False))
        return Vision(processor, kind, image_id, QWEN_MARK, banned, merge, patch, marks=marks)
    mark = str(tokenizer.convert_ids_to_tokens(image_id))
    extra = int(config.vision_feature_select_strategy == "full")
    patch = config.vision_config.patch_size
    only = frozenset([image_id])
    return Vision(processor, kind, image_id, mark, (image_id,), 1, patch, extra, only)


def image_parts(text: str) -> list[dict[str, str]]:
    """A text with image marks as the parts of a chat message."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_MARK)):
        if number:
            parts.append({"type": "image"})
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
