"""Several processes that train together: `torchrun --nproc-per-node N -m dlmctl update …`.

Each process is a rank. Only the first reads records and writes results; all of them compute.
Values that every rank needs are sent as JSON, so that nothing is unpickled; tensors of which each
rank has a share are summed. In a single process, which has not entered `joined`, these functions
are no-ops.

torchrun ends all ranks when one of them fails. A rank that waits for another has no time limit,
therefore: the stage before this one in the pipe may take hours.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import orjson
import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from dlmctl.records.errors import UnavailableError, UsageError, UserFacingError

T = TypeVar("T")

_PATIENCE = timedelta(days=365)
_ROLL_CALL = timedelta(seconds=30)
_PIECE = 2**28
"""Bytes that are sent at once."""

_control: dist.ProcessGroup | None = None
"""The gloo group of the functions here; FSDP uses torch's default group."""


class RankError(UserFacingError):
    """Another rank failed, with this exit code; 0 if it only found its work done."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("the first rank failed")
        self.exit_code = exit_code


def world_size() -> int:
    """How many ranks there are; 1 without torchrun."""
    return 1 if _control is None else dist.get_world_size(_control)


def rank() -> int:
    """The number of this process among them, from 0."""
    return 0 if _control is None else dist.get_rank(_control)


def is_first() -> bool:
    """Whether this process is the one that reads and writes."""
    return rank() == 0


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Within the block this process is one of those that torchrun started.

    Args:
        device: of `--device`; on CUDA each rank of a machine has the GPU of its number.

    Raises:
        UsageError: one GPU was named for all of them.
        UnavailableError: there are fewer GPUs than ranks.
    """
    global _control
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        _choose_gpu(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    _control = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield
    finally:
        _control = None
    # Not after a failure: others may still wait, and this call would wait with them.
    dist.destroy_process_group()


def _choose_gpu(device: str) -> None:
    if device not in ("auto", "cuda"):
        raise UsageError(f"--device {device}: under torchrun every rank has a GPU of its own")
    local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= there:
        raise UnavailableError(f"there are {there} GPUs here: torchrun --nproc-per-node {there}")
    torch.cuda.set_device(local)


def broadcast(value: T) -> T:
    """Broadcast the first rank's value, of JSON, to every rank."""
    if _control is None:
        return value
    data = orjson.dumps(value) if is_first() else b""
    length = torch.tensor([len(data)])
    dist.broadcast(length, 0, group=_control)
    content = torch.empty(int(length), dtype=torch.uint8)
    if is_first():
        content = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(content, 0, group=_control)
    received: T = orjson.loads(content.numpy().tobytes())
    return value if is_first() else received


def all_reduce_sum(values: Tensor) -> Tensor:
    """All-reduce a CPU tensor by its sum, in place."""
    if _control is not None:
        dist.all_reduce(values, group=_control)
    return values


def own_slice(count: int) -> slice:
    """This rank's part of `count` items in order; in one process all of them."""
    return slice(rank() * count // world_size(), (rank() + 1) * count // world_size())


def all_reduce_sums(tensors: Sequence[Tensor]) -> None:
    """All-reduce tensors of one dtype and device by their sum, in place and in one message."""
    if world_size() == 1:
        return
    whole = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(whole)
    parts = whole.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def all_gather(value: T) -> list[T]:
    """Gather the values of all ranks, of JSON, in their order, on each of them."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(orjson.dumps(value)), dtype=torch.uint8)
    lengths = torch.zeros(world_size(), dtype=torch.int64)
    lengths[rank()] = len(data)
    longest = int(all_reduce_sum(lengths).max())
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(world_size())]
    padded = torch.cat([data, data.new_zeros(longest - len(data))])
    dist.all_gather(parts, padded, group=_control)
    return [
        orjson.loads(part[:length].numpy().tobytes())
        for part, length in zip(parts, lengths.tolist(), strict=True)
    ]


def send_to_first(owner: int, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Send the CPU tensors that `make()` returns on rank `owner` to the first; others get none."""
    if rank() == owner:
        made = make()
        if is_first():
            return made
        data = torch.frombuffer(bytearray(save(made)), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), 0, group=_control)
        for part in data.split(_PIECE):
            dist.send(part, 0, group=_control)
    elif is_first():
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, owner, group=_control)
        data = torch.empty(int(length), dtype=torch.uint8)
        for part in data.split(_PIECE):
            dist.recv(part, owner, group=_control)
        return load(data.numpy().tobytes())
    return {}


def run_on_first(make: Callable[[], T]) -> T:
    """Call `make` on the first rank, and broadcast its result, of JSON, to every rank.

    Raises:
        RankError: on the others, if it raised an exception.
    """
    if world_size() == 1:
        return make()
    if not is_first():
        news: dict[str, Any] = broadcast({})
        if "failed" in news:
            raise RankError(news["failed"])
        received: T = news["made"]
        return received
    try:
        made = make()
    except BaseException as error:
        broadcast({"failed": _exit_code(error)})
        raise
    broadcast({"made": made})
    return made


def broadcast_items(
    items: Iterator[T], pack: Callable[[T], Any], unpack: Callable[[Any], T]
) -> Iterator[T]:
    """The items of the first rank on every rank; those of the others are ignored.

    Args:
        pack, unpack: an item to JSON, and back.
    """
    if world_size() == 1:
        yield from items
        return
    packed = map(pack, items)
    while (item := run_on_first(lambda: next(packed, None))) is not None:
        yield unpack(item)


def in_step(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The items, which each rank generates for itself, until the first rank wants no more.

    Closing this on the first rank closes `items` on all of them, at the same item.

    Raises:
        RankError: on the others, if the first closed it: nothing may follow.
    """
    for item in items:
        if not is_first():
            yield item
            if broadcast(True):
                continue
            items.close()
            raise RankError(0)
        try:
            yield item
        except GeneratorExit:
            broadcast(False)
            items.close()
            raise
        broadcast(True)


def may_save() -> bool:
    """Whether all ranks are here together, in a `finally` as elsewhere.

    They are if nothing failed. After a failure of one rank alone, or in the midst of a pass, there
    is no common state that could be saved.
    """
    if world_size() == 1:
        return True
    error = sys.exc_info()[1]
    if error is None:
        return True
    if not isinstance(error, (UserFacingError, BrokenPipeError, GeneratorExit)):
        return False
    try:
        dist.monitored_barrier(_control, _ROLL_CALL)
    except RuntimeError:
        return False
    return True


def _exit_code(error: BaseException) -> int:
    """The exit code that the command line gives it."""
    if isinstance(error, UserFacingError):
        return error.exit_code
    return {BrokenPipeError: 0, KeyboardInterrupt: 130}.get(type(error), 1)
