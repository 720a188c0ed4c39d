"""Images of records as data: URIs in a page that may be sent on.

A record may name anything, and the page leaves this machine: it embeds only files that are images
by their first bytes and are in or below the folder of the records or the current folder. Nothing is
fetched.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dlmctl.records.jsonl import Record
from dlmctl.tasks.images import image_kind

LARGEST = 4 * 2**20
"""Most bytes of a file; a browser must be able to open the page."""
NO_FILE = "no such file"
EMBEDDED = re.compile(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}")
SHOWN = ("png", "jpeg", "gif", "webp")
"""Formats that every browser shows."""


class Picture(NamedTuple):
    """An image of a record."""

    name: str
    uri: str
    """A data: URI of nothing but base64; empty if the image cannot be shown."""
    why: str = ""
    """Why it cannot be shown."""


def pictures(record: Record) -> tuple[Picture, ...]:
    """The images of a record, in order."""
    images = record.get("images") or []
    return tuple(map(_reader(record), images if isinstance(images, list) else [images]))


def _reader(record: Record) -> Callable[[Any], Picture]:
    """The function that makes a picture of an entry of `images`."""
    file = record.where.rpartition(":")[0]
    folders = [Path.cwd()] if file in ("", "<stdin>") else [Path.cwd(), Path(file).parent]

    def read(source: Any) -> Picture:
        if isinstance(source, dict):
            source = source.get("path") or source.get("url")
        if not isinstance(source, str) or not source:
            return Picture("image", "", "neither a path nor a data: URI")
        if source.startswith("data:"):
            sound = EMBEDDED.fullmatch(source) is not None
            return Picture("image", source if sound else "", "" if sound else "not a known kind")
        if "://" in source:
            return Picture(source, "", "not fetched")
        if Path(source).is_absolute():
            return Picture(source, "", "only relative paths are read")
        tried = [_embedded(source, folder) for folder in folders]
        # The file that exists, or else the most telling reason.
        return min(tried, key=lambda picture: (not picture.uri, picture.why == NO_FILE))

    return read


def _embedded(source: str, folder: Path) -> Picture:
    try:
        path = (folder / source).resolve()
        if not path.is_relative_to(folder.resolve()):
            return Picture(source, "", "outside of the records' folder")
        if not path.is_file():
            return Picture(source, "", NO_FILE)
        if path.stat().st_size > LARGEST:
            return Picture(source, "", f"larger than {LARGEST // 2**20} MiB")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        return Picture(source, "", f"cannot be read ({error})")
    kind = image_kind(data)
    if kind not in SHOWN:
        return Picture(source, "", "not PNG, JPEG, GIF or WebP")
    return Picture(source, f"data:image/{kind};base64,{base64.b64encode(data).decode()}")
