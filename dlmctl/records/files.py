"""Atomic files and directories: write beside, then rename; kill -9 leaves the old or the new."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dlmctl.records.errors import (
    CannotCreateError,
    CannotWriteError,
    DataError,
    MissingInputError,
)


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
        CannotWriteError: filling it failed, for example on a full disk; what was there stays.
    """
    _remove_left(target)
    beside = _beside(target)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        raise CannotCreateError(f"cannot create {target} ({error.strerror})") from None
    try:
        fill(beside)
        _sync(beside)
        if target.exists():
            remove_directory(target)
        os.replace(beside, target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _cannot_write(target, error) from None
        raise


def publish_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` by one rename; raises CannotWriteError."""
    beside = _beside(link)
    try:
        beside.unlink(missing_ok=True)
        beside.symlink_to(target)
        os.replace(beside, link)
    except OSError as error:
        raise _cannot_write(link, error) from None


def remove_directory(directory: Path) -> None:
    """Remove a directory so that it is at no moment there in part under its name."""
    aside = directory.with_name(f".{directory.name}.partial-{os.getpid()}-old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(directory, aside)
    except OSError:
        aside = directory  # not there, or not to be renamed
    shutil.rmtree(aside, ignore_errors=True)


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, which has all of it afterwards, or nothing.

    Raises:
        CannotCreateError: the file cannot be opened.
        CannotWriteError: writing failed, for example on a full disk.
    """
    try:
        stream = path.open("ab", buffering=0)
    except OSError as error:
        raise CannotCreateError(f"cannot create {path} ({error.strerror})") from None
    try:
        with stream:
            size = os.fstat(stream.fileno()).st_size
            try:
                while line:
                    line = line[stream.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):
                    stream.truncate(size)
                raise
    except OSError as error:
        raise _cannot_write(path, error) from None


def remove_partials(directory: Path) -> None:
    """Remove what killed processes left of files, links and directories in the making."""
    for partial in directory.glob(".*.partial-*"):
        _discard(partial)


def publish_file(target: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file beside `target`, then rename it; nothing is left where it fails.

    Raises:
        CannotCreateError: the file cannot be made.
    """
    beside = _beside(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
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


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def _cannot_write(target: Path, error: BaseException) -> CannotWriteError:
    return CannotWriteError(f"cannot write {target} ({getattr(error, 'strerror', None) or error})")


def _remove_left(target: Path) -> None:
    """Remove what processes that are gone, or had our number, left of a target in the making.

    A process of another machine seems gone. One that is writing the same target this very moment
    then fails; without that, one of the two would have written in vain.
    """
    head = f".{target.name}.partial-"
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            number = name[len(head) :].partition("-")[0]
            if name.startswith(head) and number.isdigit() and not _alive(int(number)):
                _discard(target.with_name(name))


def _discard(path: Path) -> None:
    """Remove a file, a link, or a directory with what is in it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _alive(process: int) -> bool:
    """Whether another process has this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
