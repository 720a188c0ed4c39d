"""What a host asks of a mirrored device, by the line of dlmctl that asks it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import dlmctl

PACKAGE = str(Path(dlmctl.__file__).parent)


class DeviceMixError(RuntimeError):
    """An operation on tensors of two devices."""


class Ledger:
    """What the host asked of the device."""

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self.mixes: list[str] = []
        self.kernels = 0

    def clear(self) -> None:
        """Begin again."""
        self.waits.clear()
        self.mixes.clear()
        self.kernels = 0

    def report(self, steps: int) -> dict[str, Any]:
        """The counts, and the number of steps that they are of."""
        return {"steps": steps, "kernels": self.kernels, "waits": dict(self.waits)}

    def mix(self, what: str) -> DeviceMixError:
        """Note a mix of devices, with its line; the error is for the caller to raise."""
        self.mixes.append(f"{line()}: {what}")
        return DeviceMixError(self.mixes[-1])

    def wait(self, why: str) -> None:
        """Note a wait, with the line of dlmctl that asked for it."""
        self.waits[f"{why} {line()}"] += 1


ACTIVE: list[Ledger] = []
"""That of `mirrored`, within it."""


def current() -> Ledger:
    """That of `mirrored`; behind it, one that nobody reads."""
    return ACTIVE[-1] if ACTIVE else Ledger()


def line() -> str:
    """The innermost line of dlmctl."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            file = os.path.relpath(frame.f_code.co_filename, os.path.dirname(PACKAGE))
            return f"{file}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"
