"""Standard error: it may fail, and its last line on a terminal may be the line of progress.

A log on a full disk changes neither the work nor the exit code. Progress
(`dlmctl.commands.progress`) has a line of its own, which is erased before anything else is written
to the terminal. The cursor stays visible throughout, so that a killed command leaves a terminal
that has one.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

ERASE = b"\r\x1b[K"
"""Go to the beginning of the line and erase it."""


class _Line:
    lock = threading.RLock()
    """Held while the terminal is written to."""
    drawn = False
    """Whether the line is on the terminal."""
    broken = False
    """Whether the last write has no end of line, so that nothing may be drawn behind it."""
    closed = False
    """Whether the process is about to end."""


class _Forgiving(io.FileIO):
    def write(self, data: Any) -> int:
        with aside():
            _Line.broken = bytes(data[-1:]) not in (b"", b"\n")
            with contextlib.suppress(OSError):
                super().write(shown(bytes(data)))
        return len(data)


def forgive() -> None:
    """From now on, drop what cannot be written to standard error, without an exception."""
    try:
        number = sys.stderr.fileno()
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):  # not a file, or closed
        return
    sys.stderr = io.TextIOWrapper(
        _Forgiving(number, "w", closefd=False),
        sys.stderr.encoding,
        "backslashreplace",
        write_through=True,
    )


def columns() -> int:
    """Columns of the terminal; 0 if standard error is none, or the terminal does not say."""
    try:
        return os.get_terminal_size(2).columns
    except OSError:
        return 0


def shown(message: bytes) -> bytes:
    """A message of ours as it goes to a terminal: a long one is broken between words.

    It first erases the line, which may be the progress of another stage of the pipe.
    """
    width = columns()
    if not message.startswith(b"dlmctl: ") or not width:
        return message
    start = ERASE if has_codes() else b""
    if not 20 <= width < len(message):
        return start + message
    text = message.removesuffix(b"\n")
    rows = [
        textwrap.fill(row, width, break_long_words=False, break_on_hyphens=False)
        for row in text.decode("utf-8", "replace").split("\n")
    ]
    return start + "\n".join(rows).encode() + message[len(text) :]


def has_codes() -> bool:
    """Whether the terminal understands ANSI codes."""
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def draw(text: str, wanted: Callable[[], bool]) -> None:
    """Draw a line in place of the one before; for a terminal with ANSI codes.

    Args:
        wanted: whether to draw it still; called when nobody else can write.
    """
    with _Line.lock:
        if wanted() and not (_Line.broken or _Line.closed):
            _Line.drawn = True
            with contextlib.suppress(OSError):
                os.write(2, b"\r" + text.encode() + b"\x1b[K")


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Within the block no line is drawn, and the one that was is erased."""
    with _Line.lock:
        if _Line.drawn:
            _Line.drawn = False
            with contextlib.suppress(OSError):
                os.write(2, ERASE)
        yield


def settle() -> None:
    """Erase the line for good, at the end of the process."""
    with aside():
        _Line.closed = True


def close() -> bytes:
    """Draw no more; returns the bytes that erase the line. Waits for no lock."""
    _Line.closed = True
    return ERASE if _Line.drawn else b""


def _forget() -> None:
    """In a forked child: the line, and whoever held the lock, are of the parent."""
    _Line.lock, _Line.drawn = threading.RLock(), False


os.register_at_fork(after_in_child=_forget)
