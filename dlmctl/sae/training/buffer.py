"""A shuffle buffer: activations in, random batches without replacement out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ShuffleBuffer:
    """Holds at most `capacity` rows between draws; a draw takes rows from all that are there."""

    def __init__(self, room: int, seed: int, least: int = 1, most: int | None = None) -> None:
        """Args:
        room: bytes of the rows, whose dtype decides how many that are.
        least, most: rows of the capacity, whatever the room; the least gives way.
        """
        self.room, self.least, self.most = room, least, most
        self._rows: Tensor | None = None
        self._count = 0
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def capacity(self) -> int:
        """In rows, once the first are there."""
        assert self._rows is not None
        return self._fitting(self._rows)

    def _fitting(self, rows: Tensor) -> int:
        fitting = max(self.least, self.room // (rows.shape[1] * rows.element_size()))
        return fitting if self.most is None else min(fitting, self.most)

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """What is there, [N, d]."""
        assert self._rows is not None
        return self._rows[: self._count]

    def add(self, rows: Tensor) -> None:
        """Put in rows [N, d]; beyond the capacity the buffer grows until it is drawn from."""
        if self._rows is None:
            self._rows = rows.new_empty(max(self._fitting(rows), len(rows)), rows.shape[1])
        need = self._count + len(rows)
        if need > len(self._rows):
            more = self._rows.new_empty(need - len(self._rows), rows.shape[1])
            self._rows = torch.cat([self._rows, more])
        self._rows[self._count : need] = rows
        self._count = need

    def keep(self, wanted: Tensor) -> None:
        """Drop the rows that are not wanted, bool [N]."""
        kept = self.rows[wanted]
        assert self._rows is not None
        self._rows[: len(kept)] = kept
        self._count = len(kept)

    def draw(self, count: int) -> Tensor:
        """Take out `count` random rows, or all there are."""
        rows = self.rows
        chosen = torch.randperm(self._count, generator=self._generator)[:count].to(rows.device)
        drawn = rows[chosen]
        # The last rows move into the gaps that the drawn ones leave before them.
        left = self._count - len(chosen)
        taken = torch.zeros(self._count, dtype=torch.bool, device=rows.device)
        taken[chosen] = True
        gaps = taken[:left].nonzero().flatten()
        movers = (~taken[left:]).nonzero().flatten() + left
        rows[gaps] = rows[movers]
        self._count = left
        return drawn

    def state(self) -> dict[str, Tensor]:
        """Everything that the next draw depends on."""
        rows = self.rows.cpu().clone() if self._rows is not None else torch.empty(0, 0)
        return {"rows": rows, "random": self._generator.get_state()}

    def restore(self, state: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Go on from a state."""
        self._generator.set_state(state["random"])
        self._rows, self._count = None, 0
        if state["rows"].shape[1]:
            self.add(state["rows"].to(device))
