"""Atomic files and directories: write beside, then rename; kill -9 leaves the old or the new."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlmctl.records.errors import CannotCreateError, DataError, MissingInputError


def make_directory(directory: Path) -> None:
    """Create a directory and its parents; raises CannotCreateError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotCreateError(f"cannot create {directory} ({error.strerror})") from None


def publish_directory(target: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on an empty directory beside `target`, then rename it to `target`.

    Raises:
        CannotCreateError: the directory cannot be made.
    """
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise CannotCreateError(f"cannot create {target} ({error.strerror})") from None
    try:
        fill(beside)
        _sync(beside)
        if target.exists():
            shutil.rmtree(target)
        os.replace(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def publish_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` by one rename."""
    beside = link.with_name(f".{link.name}.partial-{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    os.replace(beside, link)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left of files, links and directories in the making."""
    for partial in directory.glob(".*.partial-*"):
        if partial.is_symlink() or not partial.is_dir():
            partial.unlink(missing_ok=True)
        else:
            shutil.rmtree(partial, ignore_errors=True)


def publish_file(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file beside `target`, then rename it; nothing is left where it fails.

    Raises:
        CannotCreateError: the file cannot be made.
    """
    beside = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, target)
    except OSError as error:
        raise CannotCreateError(f"cannot write {target} ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Publish a file that holds these bytes; raises CannotCreateError."""

    def write(beside: Path) -> None:
        beside.write_bytes(data)

    publish_file(path, write)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises MissingInputError and DataError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInputError(f"{path} is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", str(path)) from None
    if not isinstance(value, dict):
        raise DataError("expected a JSON object", str(path))
    return value


def check_free(directory: Path) -> None:
    """Raise CannotCreateError where something stands already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CannotCreateError(f"{directory} is there and not empty: choose another name")


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
