"""Standard error that may fail: a log on a full disk changes neither the work nor the exit code."""

from __future__ import annotations

import io
import sys
from typing import Any


class _Forgiving(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
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
