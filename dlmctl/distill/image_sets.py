"""Sets of images as tensors, for training, sampling and comparing.

    builtin:digits      scikit-learn's 1,797 handwritten digits, 8 x 8, gray, in a fixed order that
                        mixes the classes
    FILE.safetensors    the tensor `images`, or the only tensor
    DIRECTORY           the images in it and in the folders in it
    FILE, NAME          records, tables and data sets with a column of images: images, image, img,
                        pixel_values, or the only column that `datasets` declares as images

Images of a safetensors file are bytes, or floats in [-1, 1] or [0, 1]: floats none of which is
negative count as the latter. Its metadata may state instead which numbers are black and white, as
in `range: 0:255`, or `range: any` for numbers that are not brightness, such as latents.

Two suffixes take a part of a source, so that training and held-out sets of one can be named:

    uoft-cs/cifar10@test              a split of a data set; without it, train
    uoft-cs/cifar100@cifar100/test    a split of a configuration
    builtin:digits#128:256            the images from 128 up to 256
    uoft-cs/cifar10@test#:1000        the first thousand of a split
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlmctl.distill.image_files import Source, encoded_images
from dlmctl.records.errors import DataError, MissingInputError, UsageError, missing_package
from dlmctl.settings.images import ImageReading, reading_options

DIGITS = "builtin:digits"
DIGITS_SEED = 0
"""Seed of the order of the digits, which scikit-learn has sorted by writer."""
NAME = "images"
"""The tensor of a safetensors file."""
RANGE = "range"
"""Key in the metadata of such a file; its value is BLACK:WHITE, such as 0:1, or any."""
Range = tuple[float, float]
_CUT = re.compile(r"(.+)#(\d*):(\d*)")
_PART = re.compile(r"(.+)@(?:([\w.-]+)/)?([\w.-]+)")


def read_images(
    source: str, reading: ImageReading = ImageReading(), taken: dict[Range, str] | None = None
) -> Tensor:
    """A set of images or vectors: float32, images [N, C, H, W] in [-1, 1], vectors [N, D].

    Arguments and errors are those of `read_pixels`.
    """
    return as_floats(read_pixels(source, reading, taken))


def read_pixels(
    source: str, reading: ImageReading = ImageReading(), taken: dict[Range, str] | None = None
) -> Tensor:
    """A set of images or vectors as it is stored, for `as_floats`: uint8 or float32, images
    [N, C, H, W], vectors [N, D].

    Args:
        source: as in the lists above.
        reading: what is done with images that are not tensors.
        taken: ranges that the floats of earlier sets were taken to be in, with a file for each; a
            range that this file does not state is added. Give the same to all sets that are
            compared.

    Raises:
        MissingInputError: there is no such file, split or data set.
        DataError: it contains no images, one that cannot be decoded, images of several sizes,
            floats of no known range, or floats of another range than the sets that it is compared
            with.
        UsageError: the part that #A:B takes is empty, or the source has no splits.
        UnavailableError: a package is missing.
    """
    place = _parsed(source)
    if not _is_tensor(place.name):
        return encoded_images(place, reading)
    if place.split:
        raise UsageError(f"{place.name} has no splits: leave out @{place.split}")
    if place.name.startswith("builtin:"):
        images = _digits(place.name)
    else:
        images = _of_file(Path(place.name), {} if taken is None else taken)
    part = images[place.begin : place.end]
    if not len(part):
        raise place.empty(len(images))
    return part


def training_pixels(source: str, reading: ImageReading) -> Tensor:
    """The set that a run is trained on; as `read_pixels`.

    Raises:
        UsageError: it consists of tensors, to which the reading does not apply.
    """
    if _is_tensor(bare_name(source)) and (said := reading_options(reading.recorded())):
        raise UsageError(f"{said} is for image files and data sets of them: {source} is a tensor")
    return read_pixels(source, reading)


def as_floats(images: Tensor) -> Tensor:
    """Images or vectors as float32: bytes as numbers in [-1, 1], floats as they are.

    The same number for the same byte on every device.
    """
    if images.dtype != torch.uint8:
        return images
    if images.device.type == "cpu":
        return images.float().div_(127.5).sub_(1)
    # CUDA would multiply by the reciprocal.
    return byte_levels().to(images.device)[images.long()]


def byte_levels() -> Tensor:
    """The number of each byte, float32 [256]."""
    return torch.arange(256, dtype=torch.float32).div_(127.5).sub_(1)


def images_hash(images: Tensor) -> str:
    """Identity of a set of images, 16 hex digits, whether they are kept as bytes or as floats."""
    digest = blake2b(digest_size=8)
    for part in images.split(1024):
        digest.update(as_floats(part).contiguous().numpy())
    return digest.hexdigest()


def write_images(path: Path, images: Tensor, about: dict[str, str] | None = None) -> None:
    """Write images or vectors as a safetensors file that `read_images` reads."""
    metadata = {RANGE: "-1:1", **(about or {})}
    save_file({NAME: images.contiguous().cpu()}, path, metadata=metadata)


def read_about(source: str) -> dict[str, str]:
    """The metadata that `write_images` wrote with a set; empty for another kind of set.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is not a safetensors file.
    """
    path = Path(bare_name(source))
    if path.suffix != ".safetensors":
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


def bare_name(source: str) -> str:
    """The name of a source without the part of it that is taken."""
    return _parsed(source).name


def origin(training: Mapping[str, Any]) -> dict[str, str]:
    """What samples carry of the images that their model was trained on: how these are named and
    read, and their identity.

    Args:
        training: of the model; empty if it is not recorded.
    """
    if "images" not in training or "images_hash" not in training:
        return {}
    said = f"{training['images']} {reading_options(training)}".strip()
    return {"trained_on": said, "images_hash": training["images_hash"]}


def origin_note(samples: str, identity: str) -> str | None:
    """What is to be said of samples whose model was trained on other images than they are compared
    with; None if it was on these, or if the file does not say.

    Args:
        samples: a source.
        identity: `images_hash` of the training set of the comparison.
    """
    about = read_about(samples)
    if about.get("images_hash", identity) == identity:
        return None
    return (
        f"{samples} is of a model that was trained on {about.get('trained_on', 'others')}, and "
        "--train has other images: another source, part, --resize, --crop or --gray"
    )


def _is_tensor(name: str) -> bool:
    return name.startswith("builtin:") or Path(name).suffix == ".safetensors"


def _parsed(source: str) -> Source:
    """The parts of the name of a set; a file or folder may have an @ in its own name."""
    cut = _CUT.fullmatch(source)
    name, begin, end = cut.groups() if cut else (source, "", "")
    part = None if os.path.exists(name) else _PART.fullmatch(name)
    name, config, split = part.groups() if part else (name, None, None)
    return Source(name, config, split, int(begin or 0), int(end) if end else None)


def _digits(name: str) -> Tensor:
    if name != DIGITS:
        raise MissingInputError(f"there are no images {name}; there are: {DIGITS}")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing_package("scikit-learn", "images", DIGITS) from None
    pixels = torch.from_numpy(load_digits().images).float() / 8 - 1
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(DIGITS_SEED))
    return pixels[order][:, None]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise MissingInputError(f"no file {path}") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read as safetensors ({error})") from None


def _of_file(path: Path, taken: dict[Range, str]) -> Tensor:
    with _opened(path) as file:
        stated = (file.metadata() or {}).get(RANGE)
        names = list(file.keys())
        if NAME not in names and len(names) != 1:
            raise DataError(f"{path} has no tensor '{NAME}', and {len(names)} others")
        tensor: Tensor = file.get_tensor(NAME if NAME in names else names[0])
    if tensor.dim() not in (2, 4):
        raise DataError(
            f"{path}: images are [N, C, H, W] and vectors [N, D], not {list(tensor.shape)}"
        )
    if tensor.dtype == torch.uint8:
        return tensor
    if not tensor.is_floating_point():
        raise DataError(f"{path}: images are floats or bytes, not {tensor.dtype}")
    tensor = tensor.float()  # isfinite does not take floats of 8 bits
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{path}: not all of its numbers are finite")
    if tensor.dim() == 2 or stated == "any":
        return tensor
    black, white = _stated(stated, path) if stated else _taken(tensor, path, taken)
    if (black, white) == (-1, 1):
        return tensor
    # By way of bytes, so that images that were bytes once are read as bytes are, to the last bit.
    return (tensor - black) * (255 / (white - black)) / 127.5 - 1


def _stated(text: str, path: Path) -> Range:
    try:
        black, white = map(float, text.split(":"))
        if not -math.inf < black < white < math.inf:
            raise ValueError
    except ValueError:
        what = f"{path}: its metadata has the {RANGE} {text!r}, expected as 0:1, or any"
        raise DataError(what) from None
    return black, white


def _taken(tensor: Tensor, path: Path, taken: dict[Range, str]) -> Range:
    """The range of floats whose file does not state it."""
    least, most = map(float, tensor.aminmax())
    if not -1 <= least <= most <= 1:
        raise DataError(
            f"{path}: floats from {least:g} to {most:g}, and those of images are in [-1, 1] or "
            "[0, 1]: scale or clamp them, or say in the file's metadata what black and white are "
            f"({RANGE}: 0:255, for one; {RANGE}: any takes them as they are)"
        )
    own = (0.0, 1.0) if least >= 0 else (-1.0, 1.0)
    for (black, white), other in taken.items():
        if (black, white) != own:
            raise DataError(
                f"{path} has floats in [{own[0]:g}, {own[1]:g}], and {other} in [{black:g}, "
                f"{white:g}]: sets that are compared are in one range, or state it in their "
                f"metadata ({RANGE}: 0:1)"
            )
    if own == (0, 1) and own not in taken:
        print(f"dlmctl: {path}: no number is negative, so 0 is black and 1 white", file=sys.stderr)
    taken.setdefault(own, str(path))
    return own
