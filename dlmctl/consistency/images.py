"""Sets of images as tensors, for training, sampling and comparing.

    builtin:digits      scikit-learn's 1,797 handwritten digits, 8 x 8, gray, in a fixed order that
                        mixes the classes
    FILE.safetensors    the tensor `images`, or the only one
    DIRECTORY           the images in it, by name
    FILE, NAME          records, tables and data sets with a column of images

With `#A:B` behind it a source is cut to the images from A to B, so that training and held-out sets
of one source are disjoint: `builtin:digits#0:128`, `builtin:digits#128:256`.
"""

from __future__ import annotations

import contextlib
import re
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
_CUT = re.compile(r"(.+)#(\d*):(\d*)")


def read_images(source: str, gray: bool = False) -> Tensor:
    """A set of images or vectors: float32, images [N, C, H, W] in [-1, 1], vectors [N, D].

    Args:
        source: as above.
        gray: of files with colours: one channel, the luminance.

    Raises:
        MissingInputError: there is no such file or data set.
        DataError: it holds no images, or images of several sizes.
        UsageError: the part asked for is empty.
        UnavailableError: a package is missing.
    """
    name, begin, end = _parts(source)
    found = _read(name, gray)
    part = found[int(begin or 0) : int(end) if end else None]
    if not len(part):
        raise UsageError(f"{source} is empty: {name} has {len(found)} images")
    return part


def write_images(path: Path, images: Tensor, about: dict[str, str] | None = None) -> None:
    """Images, or vectors, as the safetensors file that `read_images` reads."""
    save_file({NAME: images.contiguous().cpu()}, path, metadata=about)


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


def _read(name: str, gray: bool) -> Tensor:
    if name.startswith("builtin:"):
        return _digits(name)
    path = Path(name)
    if path.suffix == ".safetensors":
        return _of_file(path)
    if path.is_dir() and (files := sorted(p for p in path.iterdir() if p.suffix.lower() in KINDS)):
        return _stacked([_pixels(load_image(str(file)), gray) for file in files], name)
    rows = read_rows(name, "train", None, "fail")
    return _stacked([_pixels(image, gray) for row in rows for image in record_images(row)], name)


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


def _of_file(path: Path) -> Tensor:
    with _opened(path) as file:
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
        raise DataError(f"{path}: images are numbers in [-1, 1] or bytes, not {tensor.dtype}")
    tensor = tensor.float()  # of 8 bits torch cannot say whether they are finite
    if not bool(tensor.isfinite().all()):
        raise DataError(f"{path}: not all of its numbers are finite")
    return tensor


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
