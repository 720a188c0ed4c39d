"""Freed blocks stay with the process, unless the environment says what the allocator does."""

import platform
import subprocess
import sys

import pytest

MAPPED = """
import ctypes
import torch
from dlmctl.models.allocator import keep_freed_memory

class Mallinfo(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in "arena ordblks smblks hblks hblkhd a b c d e".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Mallinfo
if {keep}:
    keep_freed_memory()
before = library.mallinfo2().hblkhd
held = torch.ones({size})
print(library.mallinfo2().hblkhd - before)
"""


def mapped(keep: bool, size: int, **environment: str) -> int:
    """Bytes that a block of so many floats takes of its own from the system."""
    done = subprocess.run(
        [sys.executable, "-c", MAPPED.format(keep=keep, size=size)],
        env={"OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or platform.libc_ver()[1] < "2.33",
    reason="mallopt and mallinfo2 are glibc's",
)
def test_blocks_come_from_the_heap_that_freed_ones_go_back_to():
    sixteen_megabytes = 2**22
    assert mapped(False, sixteen_megabytes) >= 2**24
    assert mapped(True, sixteen_megabytes) == 0
    assert mapped(True, 4 * sixteen_megabytes) >= 2**26  # would leave a hole that others do not fit
    assert mapped(True, sixteen_megabytes, MALLOC_MMAP_THRESHOLD_="131072") >= 2**24
