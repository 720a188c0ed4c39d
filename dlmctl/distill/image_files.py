"""Encoded images, of folders, files and data sets, as bytes.

`load_image` makes every image RGB: rotated as its EXIF says, 16 bits reduced to 8, white behind
transparency. Then, as `ImageReading` says:

    resize    the shorter side to N pixels, the longer to N * longer / shorter, rounded down; by
              Pillow's bicubic filter, whose support grows with the reduction (antialiased)
    crop      N x N pixels, from round((side - N) / 2) on
    gray      the luminance of ITU-R 601

Resize and crop are torchvision's in their arithmetic; the filter is ours, as is to refuse images
that would have to be enlarged.

A folder is read with all folders in it, in the order of the paths; names that begin with a dot are
left out. If it has a folder `train`, or a split is named, the folder of that name is read. A folder
that was saved by `datasets`, or in which there are parquet or arrow files, is a data set.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.records.errors import DataError, MissingInputError, UsageError
from dlmctl.records.files import read_json
from dlmctl.settings.images import ImageReading
from dlmctl.tasks.images import image_column, load_image, record_images
from dlmctl.tasks.readers import FILE_KINDS, read_rows

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".parquet", ".arrow")
SAVED = ("dataset_dict.json", "dataset_info.json")
"""What a folder saved by `datasets` has: several splits, or one."""


class Source(NamedTuple):
    """Where a set of images is, and which of them are taken."""

    name: str
    config: str | None = None
    split: str | None = None
    begin: int = 0
    end: int | None = None

    def empty(self, count: int) -> UsageError:
        """The error of a part without images.

        Args:
            count: images that there are, or at least that many.
        """
        what = f"{self.name}#{self.begin}:{'' if self.end is None else self.end} is empty"
        ends = self.end is not None and self.end <= self.begin
        return UsageError(what if ends else f"{what}: {self.name} has {count} images")


def encoded_images(source: Source, reading: ImageReading) -> Tensor:
    """The images of a folder, a file of records or a data set, uint8 [N, C, H, W].

    Only those that are taken are decoded.

    Raises:
        MissingInputError: there is no such file, split or data set.
        DataError: one cannot be decoded, or is smaller than asked for; or they have several sizes.
        UsageError: the part that is taken is empty, or the source has no splits.
        UnavailableError: a package is missing.
    """
    files = _folder_images(source)
    images = _of_rows(source) if files is None else _of_files(source, files)
    return _stacked(images, source, reading)


def _folder_images(source: Source) -> list[Path] | None:
    """The files of images in a folder; None if it is not a folder of images."""
    folder = Path(source.name)
    if not os.path.isdir(folder) or any((folder / name).exists() for name in SAVED):
        return None
    split = source.split or ("train" if (folder / "train").is_dir() else "")
    files = _files(folder)
    if any(file.suffix.lower() in TABLES for file in files):
        return None
    images = [file for file in files if file.suffix.lower() in ENDINGS]
    if not images:
        return None
    part = folder / (source.config or "") / split
    if not part.is_dir():
        raise MissingInputError(f"{folder} has no folder {part.relative_to(folder)}")
    return [file for file in images if file.is_relative_to(part)]


def _files(folder: Path) -> list[Path]:
    """All files below a folder, links to folders followed, in order."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read the folder {error.filename} ({error.strerror})")

    found, seen = [], set()
    for path, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to where it is itself
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(path, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _of_files(source: Source, files: list[Path]) -> Iterator[tuple[str, Any]]:
    """The files that are taken, each with its image."""
    chosen = files[source.begin : source.end]
    if files and not chosen:
        raise source.empty(len(files))
    return ((str(file), load_image(str(file))) for file in chosen)


def _of_rows(source: Source) -> Iterator[tuple[str, Any]]:
    """The images of rows that are taken, each with its row's place."""
    _check_split(source)
    place, row = 0, None
    for row in read_rows(source.name, source.split or "train", source.config, "fail"):
        if source.end is not None and place >= source.end:
            return
        column = image_column(row)
        count = len(row[column]) if column and isinstance(row[column], list) else bool(column)
        last = place + count if source.end is None else min(place + count, source.end)
        if last > max(place, source.begin):
            images = record_images(row)[max(0, source.begin - place) : last - place]
            yield from ((getattr(row, "where", source.name), image) for image in images)
        place += count
    if row is not None and not place:
        raise DataError(
            f"{source.name} has no images in its columns {', '.join(row)}: rename one of them to "
            "image"
        )
    if place and place <= source.begin:
        raise source.empty(place)


def _check_split(source: Source) -> None:
    """Raise UsageError for a split or configuration of a source that has none, or another."""
    if source.split is None:
        return
    folder = Path(source.name)
    if folder.suffix.lower() in FILE_KINDS and not folder.is_dir():
        raise UsageError(f"{folder} is a file and has no splits: leave out @{source.split}")
    if not any((folder / name).exists() for name in SAVED):
        return
    if source.config:
        raise UsageError(f"{folder} was saved without configurations: leave out {source.config}/")
    if (folder / "state.json").exists():
        own = read_json(folder / "state.json").get("_split")
        if own != source.split:
            raise UsageError(f"{folder} has one split, {own or 'without a name'}: leave out @")


def _stacked(images: Iterable[tuple[str, Any]], source: Source, reading: ImageReading) -> Tensor:
    """Bytes of images of one size, uint8 [N, C, H, W]; one decoded image is held at a time."""
    channels, size, pixels = 1 if reading.gray else 3, None, bytearray()
    for where, image in images:
        image = _prepared(image, where, reading)
        size = size or image.size
        if image.size != size:
            both = " and ".join(f"{w}x{h}" for w, h in sorted((size, image.size)))
            raise DataError(
                f"{source.name}: images of one size are needed, and there are {both}, as {where}: "
                "--resize N and --crop N make them N x N"
            )
        pixels += _planes(image)
    if size is None:
        if source.end is not None and source.end <= source.begin:
            raise source.empty(0)
        raise DataError(f"{source.name} has no images")
    return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, channels, size[1], size[0])


def _prepared(image: Any, where: str, reading: ImageReading) -> Any:
    """An image of Pillow in RGB, resized, cropped and made gray."""
    from PIL import Image

    for option, side in (("--resize", reading.resize), ("--crop", reading.crop)):
        if side and min(image.size) < side:
            raise DataError(
                f"{image.width}x{image.height} is smaller than {option} {side}, and images are not "
                "enlarged: give less, or leave it out",
                where,
            )
    if reading.resize:
        short = min(image.size)
        size = (reading.resize * image.width // short, reading.resize * image.height // short)
        image = image.resize(size, Image.Resampling.BICUBIC)
    if reading.crop:
        left, top = (round((side - reading.crop) / 2) for side in image.size)
        image = image.crop((left, top, left + reading.crop, top + reading.crop))
    return image.convert("L") if reading.gray else image


def _planes(image: Any) -> bytes:
    """The bytes of an image, channel by channel."""
    import numpy

    array = numpy.asarray(image)
    return (array if array.ndim == 2 else array.transpose(2, 0, 1)).tobytes()
