"""A shuffle buffer: activations in, random batches without replacement out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dlmctl.models.sending import sent


class ShuffleBuffer:
    """Has at most `capacity` rows between draws; a draw takes rows at random from all of them."""

    def __init__(self, room: int, seed: int, least: int = 1, most: int | None = None) -> None:
        """Args:
        room: bytes for the rows, whose dtype decides how many fit.
        least, most: bounds of the capacity in rows, whatever the room; `most` has precedence.
        """
        self.room, self.least, self.most = room, least, most
        self._storage: Tensor | None = None
        """[capacity or more, d], of which the first `_count` rows are in use."""
        self._count = 0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def capacity(self) -> int:
        """In rows, once there are any."""
        assert self._storage is not None
        return self._capacity(self._storage)

    def _capacity(self, rows: Tensor) -> int:
        fitting = max(self.least, self.room // (rows.shape[1] * rows.element_size()))
        return fitting if self.most is None else min(fitting, self.most)

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """The contents, [N, d]."""
        assert self._storage is not None
        return self._storage[: self._count]

    def add(self, rows: Tensor) -> None:
        """Append rows [N, d]; beyond the capacity the buffer grows until the next draw."""
        if self._storage is None:
            self._storage = rows.new_empty(max(self._capacity(rows), len(rows)), rows.shape[1])
        count = self._count + len(rows)
        if count > len(self._storage):
            more = self._storage.new_empty(count - len(self._storage), rows.shape[1])
            self._storage = torch.cat([self._storage, more])
        self._storage[self._count : count] = rows
        self._count = count

    def keep(self, wanted: Tensor) -> None:
        """Drop the rows that are not wanted, bool [N]."""
        kept = self.rows[wanted]
        self.rows[: len(kept)] = kept
        self._count = len(kept)

    def draw(self, count: int) -> Tensor:
        """Take out `count` random rows, or all there are."""
        chosen = torch.randperm(self._count, generator=self._generator)[:count]
        # The remaining rows behind the new end move into the gaps before it.
        left = self._count - len(chosen)
        taken = torch.zeros(self._count, dtype=torch.bool)
        taken[chosen] = True
        gaps = taken[:left].nonzero().flatten()
        movers = (~taken[left:]).nonzero().flatten() + left  # as many as gaps
        places = sent(torch.cat([chosen, gaps, movers]), self.rows.device)
        chosen, gaps, movers = places.split([len(chosen), len(gaps), len(movers)])
        drawn = self.rows[chosen]
        self.rows[gaps] = self.rows[movers]
        self._count = left
        return drawn

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
