"""Atomic files and directories: write to a temporary name, then rename. After a kill -9 the target
is the old one or the new one, never a part."""

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
    """Call `fill` on an empty temporary directory, then rename it to `target`.

    Raises:
        CannotCreateError: the directory cannot be created.
        CannotWriteError: filling it failed, for example on a full disk; the old target stays.
    """
    _remove_leftovers(target)
    partial = _partial(target)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CannotCreateError(f"cannot create {target} ({error.strerror})") from None
    try:
        fill(partial)
        for path in partial.rglob("*"):
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        if target.exists():
            remove_directory(target)
        os.replace(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":
            raise _cannot_write(target, error) from None
        raise


def publish_link(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` by one rename; raises CannotWriteError."""
    partial = _partial(link)
    try:
        partial.unlink(missing_ok=True)
        partial.symlink_to(target)
        os.replace(partial, link)
    except OSError as error:
        raise _cannot_write(link, error) from None


def publish_file(target: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a temporary file, then rename it to `target`; a failure leaves nothing.

    Raises:
        CannotCreateError: the file cannot be written.
    """
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        write(partial)
        os.replace(partial, target)
    except OSError as error:
        raise CannotCreateError(f"cannot write {target} ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def write_file(path: Path, data: bytes) -> None:
    """Publish a file of these bytes; raises CannotCreateError."""
    publish_file(path, lambda partial: partial.write_bytes(data))


def append_line(path: Path, line: bytes) -> None:
    """Append a line to a file, which then has all of it, or nothing.

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


def remove_directory(directory: Path) -> None:
    """Remove a directory; at no moment is a part of it there under its name."""
    aside = directory.with_name(f".{directory.name}.partial-{os.getpid()}-old")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(directory, aside)
    except OSError:
        aside = directory  # it does not exist, or cannot be renamed
    shutil.rmtree(aside, ignore_errors=True)


def remove_partials(directory: Path) -> None:
    """Remove the temporary files, links and directories that killed processes left."""
    for partial in directory.glob(".*.partial-*"):
        _discard(partial)


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
    """Raise CannotCreateError if the path exists and is not an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CannotCreateError(f"{directory} is there and not empty: choose another name")


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial-{os.getpid()}")


def _cannot_write(target: Path, error: BaseException) -> CannotWriteError:
    return CannotWriteError(f"cannot write {target} ({getattr(error, 'strerror', None) or error})")


def _remove_leftovers(target: Path) -> None:
    """Remove temporary versions of a target left by dead processes, or by one with our number.

    A process on another machine seems dead. If it is writing the same target right now, it fails;
    otherwise one of the two would have written in vain.
    """
    head = f".{target.name}.partial-"
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            number = name[len(head) :].partition("-")[0]
            if name.startswith(head) and number.isdigit() and not _is_other_process(int(number)):
                _discard(target.with_name(name))


def _discard(path: Path) -> None:
    """Remove a file, a link, or a directory with its content."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _is_other_process(number: int) -> bool:
    """Whether another process that lives has this number."""
    if number == os.getpid():
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it belongs to another user
        return True
    return True
