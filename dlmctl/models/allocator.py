"""Allocators: the C library's, set for work that allocates the same large blocks repeatedly, and
torch's on a GPU, which keeps what was freed until it is told that another process needs it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers from glibc's malloc.h."""
LARGEST, KEPT = 2**25, 2**30


@functools.cache
def keep_freed_memory() -> None:
    """Keep freed blocks of up to 32 MiB in the process for reuse, up to 1 GiB in all.

    Otherwise glibc returns them to the system, and every pass through a model gets its memory page
    by page again: sampling on the CPU took 1.7 times as long. Larger blocks are returned, as they
    would leave holes that others do not fit. If the environment has MALLOC_ variables, or the C
    library is not glibc, nothing changes.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, LARGEST)
        library.mallopt(M_TRIM_THRESHOLD, KEPT)


def release_cached_memory(device: torch.device) -> None:
    """Return memory that torch keeps for reuse to the GPU, for other processes; elsewhere a no-op.

    To be called at the end of a round: of a training loop on one GPU, sampling and training wait
    for each other, and each would keep the most that it ever needed.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
