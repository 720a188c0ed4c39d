"""Sets of images as tensors, for training, sampling and comparing.

    builtin:digits      scikit-learn's 1,797 handwritten digits, 8 x 8, gray, in a fixed order that
                        mixes the classes
    FILE.safetensors    the tensor `images`, or the only one
    DIRECTORY           the images in it, by name
    FILE, NAME          records, tables and data sets with a column of images: images, image, img,
                        pixel_values, or the only one that is of images by `datasets`

Images of a safetensors file are bytes, or floats in [-1, 1] or [0, 1]: all that are not negative
are taken for the latter. Its metadata may say instead what stands for black and white, as
`range: 0:255`, or `range: any` for what is no brightness, as latents.

With `#A:B` behind it a source is cut to the images from A to B, so that training and held-out sets
of one source are disjoint: `builtin:digits#0:128`, `builtin:digits#128:256`.
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
"""Of the order of the digits; as scikit-learn has them they stand writer by writer."""
NAME = "images"
"""The tensor of a safetensors file."""
KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
RANGE = "range"
"""In the metadata of such a file: what is black and what white, as 0:1, or any."""
Range = tuple[float, float]
_CUT = re.compile(r"(.+)#(\d*):(\d*)")


def read_images(source: str, gray: bool = False, taken: dict[Range, str] | None = None) -> Tensor:
    """A set of images or vectors: float32, images [N, C, H, W] in [-1, 1], vectors [N, D].

    Args:
        source: as above.
        gray: of files with colours: one channel, the luminance.
        taken: of sets that are compared: the ranges that floats were taken to be in, with a file of
            each. One that no file stated is put in.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: it holds no images, images of several sizes, or floats of no known range; or
            floats of another range than those that it is compared with.
        UsageError: the part asked for is empty.
        UnavailableError: a package is missing.
    """
    name, begin, end = _parts(source)
    found = _read(name, gray, {} if taken is None else taken)
    part = found[int(begin or 0) : int(end) if end else None]
    if not len(part):
        raise UsageError(f"{source} is empty: {name} has {len(found)} images")
    return part


def write_images(path: Path, images: Tensor, about: dict[str, str] | None = None) -> None:
    """Images, or vectors, as the safetensors file that `read_images` reads."""
    metadata = {RANGE: "-1:1", **(about or {})}
    save_file({NAME: images.contiguous().cpu()}, path, metadata=metadata)


def read_about(source: str) -> dict[str, str]:
    """What `write_images` was told about a set; empty for one of another kind.

    Raises:
        MissingInputError: there is no such file.
        DataError: it is no safetensors file.
    """
    path = Path(_parts(source)[0])
    if path.suffix != ".safetensors":
        return {}
    with _opened(path) as file:
        return dict(file.metadata() or {})


def _parts(source: str) -> tuple[str, str, str]:
    """Name, first image and the one behind the last."""
    cut = _CUT.fullmatch(source)
    name, begin, end = cut.groups() if cut else (source, "", "")
    return name, begin, end


def _read(name: str, gray: bool, taken: dict[Range, str]) -> Tensor:
    if name.startswith("builtin:"):
        return _digits(name)
    path = Path(name)
    if path.suffix == ".safetensors":
        return _of_file(path, taken)
    if path.is_dir() and (files := sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS)):
        return _stacked([_pixels(load_image(str(file)), gray) for file in files], name)
    rows, images, row = read_rows(name, "train", None, "fail"), [], None
    for row in rows:
        images += [_pixels(image, gray) for image in record_images(row)]
    if row is not None and not images:
        columns = ", ".join(row)
        raise DataError(f"{name} holds no images in its columns {columns}: name one of them image")
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
    tensor = tensor.float()  # of 8 bits torch cannot say whether they are finite
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{path}: not all of its numbers are finite")
    if tensor.dim() == 2 or stated == "any":
        return tensor
    black, white = _stated(stated, path) if stated else _taken(tensor, path, taken)
    if (black, white) == (-1, 1):
        return tensor
    # By way of bytes, so that images that were bytes come out as those do, to the last bit.
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
    """The range of floats of which no one has said it."""
    least, most = map(float, tensor.aminmax())
    if not -1 <= least <= most <= 1:
        raise DataError(
            f"{path}: floats from {least:g} to {most:g}, and those of images are in [-1, 1] or "
            "[0, 1]: scale or clamp them, or say in the file's metadata what black and white are "
            f"({RANGE}: 0:255, for one; {RANGE}: any takes them as they are)"
        )
    found = (0.0, 1.0) if least >= 0 else (-1.0, 1.0)
    for (black, white), other in taken.items():
        if (black, white) != found:
            raise DataError(
                f"{path} has floats in [{found[0]:g}, {found[1]:g}], and {other} in [{black:g}, "
                f"{white:g}]: sets that are compared are in one range, or state it in their "
                f"metadata ({RANGE}: 0:1)"
            )
    if found == (0, 1) and found not in taken:
        print(f"dlmctl: {path}: no number is negative, so 0 is black and 1 white", file=sys.stderr)
    taken.setdefault(found, str(path))
    return found


def _pixels(image: Any, gray: bool) -> Tensor:
    """float32 [C, H, W] in [-1, 1] of an image of Pillow."""
    import numpy

    held = numpy.asarray(image.convert("L" if gray else "RGB"), dtype=numpy.float32)
    pixels = torch.from_numpy(held) / 127.5 - 1
    return pixels[None] if gray else pixels.permute(2, 0, 1)


def _stacked(images: list[Tensor], name: str) -> Tensor:
    sizes = {tuple(image.shape[1:]) for image in images}
    if not images:
        raise DataError(f"{name} holds no images")
    if len(sizes) > 1:
        (h, w), (h2, w2) = sorted(sizes)[:2]
        raise DataError(
            f"{name}: images of one size are needed, and there are {w}x{h} and {w2}x{h2}"
        )
    return torch.stack(images)
