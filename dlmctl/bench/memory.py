"""Peak memory of some work, on CUDA and on Linux."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Megabytes that the body of `with` needs at its peak, on top of what was in use before.

    On CUDA, what torch allocates; on Linux, the process's resident memory; elsewhere None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.megabytes: float | None = None

    def __enter__(self) -> Peak:
        gc.collect()
        _return_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device) / 1e6
        elif CLEAR.exists():
            CLEAR.write_text("5")  # resets VmHWM
            self._before = _resident("VmRSS")
        return self

    def __exit__(self, *error: object) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 1e6
            self.megabytes = peak - self._before
        elif CLEAR.exists():
            self.megabytes = _resident("VmHWM") - self._before


def _return_freed_memory() -> None:
    """Return it to the system if the C library can; a peak below what it keeps would not show."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident(name: str) -> float:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")
