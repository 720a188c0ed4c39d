"""Sets of images as tensors, for training, sampling and comparing.

    builtin:digits      scikit-learn's 1,797 handwritten digits, 8 x 8, gray, in a fixed order that
                        mixes the classes
    FILE.safetensors    the tensor `images`, or the only tensor
    DIRECTORY           the images in it, by name
    FILE, NAME          records, tables and data sets with a column of images: images, image, img,
                        pixel_values, or the only column that `datasets` declares as images

Images of a safetensors file are bytes, or floats in [-1, 1] or [0, 1]: floats none of which is
negative count as the latter. Its metadata may state instead which numbers are black and white, as
in `range: 0:255`, or `range: any` for numbers that are not brightness, such as latents.

A suffix `#A:B` takes the images from A up to B, so that training and held-out sets of one source
can be disjoint: `builtin:digits#0:128`, `builtin:digits#128:256`.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dlmctl.records.errors import DataError, MissingInputError, UsageError, missing_package
from dlmctl.tasks.images import load_image, record_images
from dlmctl.tasks.readers import read_rows

DIGITS = "builtin:digits"
DIGITS_SEED = 0
"""Seed of the order of the digits, which scikit-learn has sorted by writer."""
NAME = "images"
"""The tensor of a safetensors file."""
ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
RANGE = "range"
"""Key in the metadata of such a file; its value is BLACK:WHITE, such as 0:1, or any."""
Range = tuple[float, float]
_CUT = re.compile(r"(.+)#(\d*):(\d*)")


def read_images(source: str, gray: bool = False, taken: dict[Range, str] | None = None) -> Tensor:
    """A set of images or vectors: float32, images [N, C, H, W] in [-1, 1], vectors [N, D].

    Args:
        source: as in the list above.
        gray: read image files as one channel, their luminance.
        taken: ranges that the floats of earlier sets were taken to be in, with a file for each; a
            range that this file does not state is added. Give the same to all sets that are
            compared.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: it contains no images, images of several sizes, floats of no known range, or
            floats of another range than the sets that it is compared with.
        UsageError: the part that #A:B takes is empty.
        UnavailableError: a package is missing.
    """
    name, begin, end = _split(source)
    images = _read(name, gray, {} if taken is None else taken)
    part = images[int(begin or 0) : int(end) if end else None]
    if not len(part):
        raise UsageError(f"{source} is empty: {name} has {len(images)} images")
    return part


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
    path = Path(_split(source)[0])
    if path.suffix != ".safetensors":
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _split(source: str) -> tuple[str, str, str]:
    """Name, first image, and the image after the last."""
    cut = _CUT.fullmatch(source)
    name, begin, end = cut.groups() if cut else (source, "", "")
    return name, begin, end


def _read(name: str, gray: bool, taken: dict[Range, str]) -> Tensor:
    if name.startswith("builtin:"):
        return _digits(name)
    path = Path(name)
    if path.suffix == ".safetensors":
        return _of_file(path, taken)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in ENDINGS)
        if files:
            return _stacked([_pixels(load_image(str(file)), gray) for file in files], name)
    rows, images, row = read_rows(name, "train", None, "fail"), [], None
    for row in rows:
        images += [_pixels(image, gray) for image in record_images(row)]
    if row is not None and not images:
        columns = ", ".join(row)
        raise DataError(
            f"{name} has no images in its columns {columns}: rename one of them to image"
        )
    return _stacked(images, name)


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
        return tensor.float() / 127.5 - 1
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


def _pixels(image: Any, gray: bool) -> Tensor:
    """float32 [C, H, W] in [-1, 1] of an image of Pillow."""
    import numpy

    array = numpy.asarray(image.convert("L" if gray else "RGB"), dtype=numpy.float32)
    pixels = torch.from_numpy(array) / 127.5 - 1
    return pixels[None] if gray else pixels.permute(2, 0, 1)


def _stacked(images: list[Tensor], name: str) -> Tensor:
    sizes = {tuple(image.shape[1:]) for image in images}
    if not images:
        raise DataError(f"{name} has no images")
    if len(sizes) > 1:
        (h, w), (h2, w2) = sorted(sizes)[:2]
        raise DataError(
            f"{name}: images of one size are needed, and there are {w}x{h} and {w2}x{h2}"
        )
    return torch.stack(images)
