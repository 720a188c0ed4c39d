"""Images of records: paths, data URIs, the undecoded column of `datasets`, images of Pillow.

Files and URIs are not trusted: only raster formats are read, with a limit on their bytes, and one
on their pixels that is checked in the header, before anything is decoded. Every image becomes RGB,
rotated according to its EXIF, with white behind transparency.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlmctl.records.errors import DataError, missing_package

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Formats that Pillow may try; for several frames, the first is read."""
MOST_PIXELS = 64_000_000
MOST_BYTES = 64 * 2**20
"""Most bytes of a file, or of the text of a data URI."""
COLUMNS = ("images", "image", "img", "pixel_values")
"""Names of a column of images; the first that exists counts."""
_BEGINNINGS = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"BM": "bmp"}


def load_image(source: Any, base: str = "") -> Image:
    """An image in RGB.

    Args:
        source: a path, a `data:` URI, `{"bytes": ..., "path": ...}`, bytes, or an image of Pillow.
        base: folder of relative paths, after the current one.

    Raises:
        DataError: it does not exist, or is no image of these formats and limits.
        UnavailableError: Pillow is not installed.
    """
    _pillow()
    if isinstance(source, Mapping):
        return load_image(_of_column(source), base)
    if isinstance(source, bytes):
        return _decoded(source, "the image")
    if isinstance(source, str):
        if source[:5].lower() == "data:":
            return _decoded(data_uri_bytes(source), "the image of the data URI")
        path = image_path(source, base)
        return _decoded(_file_bytes(path), str(path))
    if hasattr(source, "getbands"):
        _check_size(source, "the image")
        return _rgb(source)
    raise DataError(f"an image is a path, a data: URI or bytes, not {type(source).__name__}")


def record_images(record: Mapping[str, Any]) -> list[Image]:
    """The images of a record or a row; relative paths may be relative to its file.

    Raises:
        DataError: an image cannot be read, or there are several columns of images; the message
            says which.
    """
    where = getattr(record, "where", "")
    column = image_column(record)
    listed = _listed(record[column]) if column else []
    images = []
    for number, source in enumerate(listed, start=1):
        try:
            images.append(load_image(source, record_folder(where)))
        except DataError as error:
            which = f"image {number} of {len(listed)}: " if len(listed) > 1 else ""
            raise DataError(which + error.message, where) from None
    return images


def image_column(row: Mapping[str, Any]) -> str | None:
    """The column of images of a row: by its name, else by what `datasets` stores there.

    Raises:
        DataError: several columns have images, and none of them has one of the names.
    """
    for name in COLUMNS:
        if row.get(name) is not None:
            return name
    columns = [name for name, value in row.items() if value and all(map(_stored, _listed(value)))]
    if len(columns) > 1:
        raise DataError(
            f"there are images in the columns {', '.join(columns)}: name the one that is meant "
            f"{COLUMNS[1]}",
            getattr(row, "where", ""),
        )
    return columns[0] if columns else None


def _stored(value: Any) -> bool:
    """Whether a value is an image as `datasets` stores one."""
    return isinstance(value, Mapping) and value.keys() == {"bytes", "path"}


def image_sources(record: Mapping[str, Any]) -> list[Any]:
    """The images in `images` (a list, or one image) or `image` of a record."""
    value = record.get("images")
    value = record.get("image") if value is None else value
    return [] if value is None else _listed(value)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def record_folder(where: str) -> str:
    """The folder of a record's file, by its `file:line`."""
    return str(Path(where.rpartition(":")[0]).parent)


def image_path(name: str, base: str = "") -> Path:
    """The file of a path: relative to the current folder, else to `base`, else as it is.

    Raises:
        DataError: it is a network address.
    """
    if "://" in name:
        raise DataError(
            f"{name[:80]} is an address: images are not fetched from the network; "
            "download it and give its path"
        )
    path, based = Path(name), Path(base) / name
    return based if not os.path.exists(path) and os.path.exists(based) else path


def image_hash(image: Image) -> str:
    """Digest of mode, size and pixels."""
    head = f"{image.mode} {image.width}x{image.height} ".encode()
    return blake2b(head + image.tobytes(), digest_size=16).hexdigest()


def as_data_uri(source: bytes | Image) -> str:
    """A `data:` URI of a file's bytes, unchanged, or of an image as PNG."""
    if not isinstance(source, bytes):
        stream = io.BytesIO()
        source.save(stream, "PNG")
        source = stream.getvalue()
    return f"data:image/{image_kind(source) or 'png'};base64,{base64.b64encode(source).decode()}"


def data_uri_bytes(uri: str) -> bytes:
    """The bytes of a data URI in base64; raises DataError if it is none, or too long."""
    if len(uri) > MOST_BYTES:
        raise DataError(f"the data URI has {len(uri)} characters, more than {MOST_BYTES}")
    head, comma, data = uri.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise DataError(f"the data URI {uri[:40]} is not data:image/...;base64,...")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"the data URI is not base64 ({error})") from None


def _of_column(entry: Mapping[str, Any]) -> Any:
    """Bytes, else path, of an entry in a column of images of `datasets`."""
    for name in ("bytes", "path"):
        if entry.get(name) is not None:
            return entry[name]
    raise DataError("an image with neither 'bytes' nor 'path'")


def _file_bytes(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise DataError(f"there is no image file {path}")
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{path} has more than {MOST_BYTES} bytes")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot read the image {str(path)[:80]!r} ({reason})") from None


def _decoded(data: bytes, name: str) -> Image:
    """The first frame of an encoded image; `name` is for messages."""
    pillow = _pillow()
    kinds = ", ".join(FORMATS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns at limits above ours
        try:
            image = pillow.open(io.BytesIO(data), formats=FORMATS)
        except pillow.DecompressionBombError:
            raise DataError(f"{name} has more than {MOST_PIXELS} pixels") from None
        except pillow.UnidentifiedImageError:
            raise DataError(f"{name} is not an image in one of the formats {kinds}") from None
        except Exception as error:  # a broken header fails in many ways
            raise DataError(f"{name} cannot be decoded ({error})") from None
        _check_size(image, name)
        try:
            return _rgb(image)
        except Exception as error:  # decoders raise anything on broken bytes
            raise DataError(f"{name} cannot be decoded ({error})") from None


def _check_size(image: Image, name: str) -> None:
    if image.width * image.height > MOST_PIXELS:
        size = f"{image.width} x {image.height}"
        raise DataError(f"{name} has {size} pixels, more than {MOST_PIXELS} in all")
    if image.width * image.height == 0:
        raise DataError(f"{name} has no pixels")


def _rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def image_kind(data: bytes) -> str:
    """Media type of a file by its first bytes, without `image/`; empty if it is none of ours."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for start, kind in _BEGINNINGS.items() if data.startswith(start)), "")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise missing_package("pillow", "vision", "reading images") from None
    return Image
