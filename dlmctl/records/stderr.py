"""Standard error: it may fail, and its last line on a terminal may be one that is drawn again.

A log on a full disk changes neither the work nor the exit code. What shows how far a command is
(`dlmctl.commands.progress`) stands on a line of its own that whatever else is written to the
terminal takes away first. The cursor stays visible throughout, so that a command that is killed
leaves no terminal without one.
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
"""To the beginning of the line, and all of it away."""


class _Line:
    lock = threading.RLock()
    """Held while the terminal is written to."""
    drawn = False
    """Whether the line stands there."""
    broken = False
    """Whether what was written last has no end of line, and nothing may be drawn behind it."""
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
    """Make what is said on standard error from now on be lost where it cannot be written."""
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
    """Of the terminal; 0 where standard error is none, or a terminal does not say."""
    try:
        return os.get_terminal_size(2).columns
    except OSError:
        return 0


def shown(message: bytes) -> bytes:
    """A message of ours as a terminal is given it: broken between words where it is long.

    It takes away what stands on the line, which may be that of another stage of the pipe.
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
    """Whether the terminal understands more than text."""
    return os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")


def draw(text: str, wanted: Callable[[], bool]) -> None:
    """Put a line in the place of the one that was drawn before; for a terminal with ANSI codes.

    Args:
        wanted: whether it still is, asked when nobody else can write.
    """
    with _Line.lock:
        if wanted() and not (_Line.broken or _Line.closed):
            _Line.drawn = True
            with contextlib.suppress(OSError):
                os.write(2, b"\r" + text.encode() + b"\x1b[K")


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Within the block no line is drawn, and the one that was is gone."""
    with _Line.lock:
        if _Line.drawn:
            _Line.drawn = False
            with contextlib.suppress(OSError):
                os.write(2, ERASE)
        yield


def settle() -> None:
    """Leave no line behind at the end of the process."""
    with aside():
        _Line.closed = True


def close() -> bytes:
    """Draw nothing any more; returns what takes away the line that stands. Waits for nobody."""
    _Line.closed = True
    return ERASE if _Line.drawn else b""


def _forget() -> None:
    """In a forked child: the line is the parent's, and so is who held the lock."""
    _Line.lock, _Line.drawn = threading.RLock(), False


os.register_at_fork(after_in_child=_forget)
