"""Freed blocks stay with the process, unless the environment says what the allocator does; on a GPU
until a round is over."""

import platform
import subprocess
import sys

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion import follow
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.models.allocator import release_cached_memory
from dlmctl.models.saving import save_policy
from dlmctl.records.jsonl import Record
from dlmctl.rl import update
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching
from dlmctl.settings.compute import QuantizedCompute
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.rollout import Loop
from dlmctl.settings.sampler import Sampler
from dlmctl.train.run import open_run
from dlmctl.train.run_directory import latest_checkpoint, read_progress

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


@pytest.mark.cuda
def test_memory_that_torch_keeps_is_returned_to_the_gpu():
    before = torch.cuda.memory_reserved()
    held = torch.ones(2**26, device="cuda")
    del held
    assert torch.cuda.memory_reserved() >= before + 2**28
    release_cached_memory(torch.device("cuda"))
    assert torch.cuda.memory_reserved() <= before


def test_each_side_of_a_loop_returns_memory_once_in_a_round(tmp_path, monkeypatch):
    """`update` before the checkpoint that `rollout` waits for, and that before it waits."""
    save_policy(tiny_policy(), tmp_path / "model")
    model, home = str(tmp_path / "model"), tmp_path / "run"
    events = []

    def rounds():
        checkpoint = latest_checkpoint(home)
        return None if checkpoint is None else read_progress(checkpoint).round

    def released(side):
        return lambda device: events.append((side, device.type, rounds()))

    monkeypatch.setattr(follow, "release_cached_memory", released("rollout"))
    monkeypatch.setattr(update, "release_cached_memory", released("update"))
    prompts = (Record(id=f"p{n}", prompt="12=") for n in range(4))
    sampled = follow.follow_run(
        prompts,
        Loop(follow=home, rounds=2),
        model,
        Sampler(gen_length=4, steps=2),
        2,
        2,
        0,
        QuantizedCompute("cpu", batch_size=4),
        "fail",
    )

    def verified():
        for number, record in enumerate(sampled):
            events.append("sample")
            yield Record(record | {"reward": float(number % 2)})

    run = open_run(home, model, "rspo", Optimizer(), Adapter(), "cpu", "auto", False, 0)
    objective, batching = make_objective("rspo", strength=0.05), Batching(MaskPlan(samples=2))
    list(update.update_policy(verified(), run, objective, batching, 2, 8, 100, 2))
    one = ["sample"] * 4
    assert events == [
        *one, ("update", "cpu", None), ("rollout", "cpu", 1),
        *one, ("update", "cpu", 1), ("rollout", "cpu", 2),
    ]  # fmt: skip
