"""A shuffle buffer: activations in, random batches without replacement out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dlmctl.models.sending import sent

SHARE = 4
"""Buffers whose size nobody decided take at most a fourth of the free memory, all together."""
DEVICE_SHARE = 10
"""Buffers that take more than a tenth of a device's free memory, all together, are on the host."""


class ShuffleBuffer:
    """Has at most `capacity` rows between draws; a draw takes rows at random from all of them."""

    def __init__(self, capacity: int, seed: int, on_host: bool = False) -> None:
        """Args:
        capacity: in rows.
        on_host: whether rows of a device are in the memory of the host until they are drawn.
        """
        self.capacity, self.on_host = capacity, on_host
        self._device = torch.device("cpu")
        self._storage: Tensor | None = None
        """[capacity or more, d], of which the first `_count` rows are in use."""
        self._count = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """The contents, [N, d]."""
        assert self._storage is not None
        return self._storage[: self._count]

    def first(self, count: int) -> Tensor:
        """The first rows, at most `count`, on the device that they came from."""
        return sent(self.rows[:count], self._device)

    def add(self, rows: Tensor) -> None:
        """Append rows [N, d]; beyond the capacity the buffer grows until the next draw."""
        count = self._count + len(rows)
        if self._storage is None:
            self._device = rows.device
            self._storage = self._empty(max(self.capacity, count), rows)
        elif count > len(self._storage):
            kept, self._storage = self.rows, self._empty(count, rows)
            self._storage[: self._count] = kept
        self._storage[self._count : count] = rows
        self._count = count

    def _empty(self, count: int, like: Tensor) -> Tensor:
        if not self.on_host or like.device.type == "cpu":
            return like.new_empty(count, like.shape[1])
        # Pinned, so that the device copies into it without help.
        pinned = like.device.type == "cuda"
        return torch.empty(count, like.shape[1], dtype=like.dtype, pin_memory=pinned)

    def keep(self, wanted: Tensor) -> None:
        """Drop the rows that are not wanted, bool [N]."""
        kept = self.rows[wanted.to(self.rows.device)]
        self.rows[: len(kept)] = kept
        self._count = len(kept)

    def draw(self, count: int) -> Tensor:
        """Take out `count` random rows, or all there are."""
        chosen = distinct(min(count, self._count), self._count, self._generator)
        # The remaining rows behind the new end move into the gaps before it.
        left = self._count - len(chosen)
        behind = torch.ones(len(chosen), dtype=torch.bool)
        behind[chosen[chosen >= left] - left] = False
        gaps, movers = chosen[chosen < left], behind.nonzero().flatten() + left  # as many
        places = sent(torch.cat([chosen, gaps, movers]), self.rows.device)
        chosen, gaps, movers = places.split([len(chosen), len(gaps), len(movers)])
        drawn = self.rows[chosen]
        self.rows[gaps] = self.rows[movers]
        self._count = left
        return sent(drawn, self._device)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next draw depends on."""
        rows = torch.empty(0, 0) if self._storage is None else self.rows.cpu().clone()
        return {"rows": rows, "random": self._generator.get_state()}

    def restore(self, state: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Resume from a state."""
        self._generator.set_state(state["random"])
        self._storage, self._count = None, 0
        if state["rows"].shape[1]:
            self.add(state["rows"].to(device))


def distinct(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `size`, int64, all orders being equally likely.

    They are the first distinct ones of a sequence of independent numbers, so that a draw costs
    what it takes, and not the size of the buffer.
    """
    if 2 * count >= size:
        return torch.randperm(size, generator=generator)[:count]
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        more = count - len(found)
        more += more // 8 + 8  # some repeat others
        found = torch.cat([found, torch.randint(size, (more,), generator=generator)])
        values, places = found.sort(stable=True)
        new = torch.ones_like(values, dtype=torch.bool)
        new[1:] = values[1:] != values[:-1]
        found = found[places[new].sort().values]
    return found[:count]


def fits_device(size: int, device: torch.device) -> bool:
    """Whether buffers of this many bytes in all may be on a device."""
    if device.type != "cuda":
        return device.type == "cpu"
    return size <= torch.cuda.mem_get_info(device)[0] // DEVICE_SHARE


def share_of_memory() -> int:
    """Bytes that all buffers may take together if nobody decided."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: rest for name, _, rest in (line.partition(":") for line in lines)}
        return int(sizes["MemAvailable"].split()[0]) * 1024 // SHARE
    except (OSError, KeyError, ValueError):
        # Elsewhere only the whole memory is known.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2 // SHARE
