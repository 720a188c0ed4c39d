"""Proposals of the model with signals that may tell, before a token is decided, if it is right.

The measure is the AUROC: the chance that of a right and a wrong proposal, drawn at random, the
right one has the higher signal. Within a step, a signal that is merely a clock says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

POOL = 1 << 17
"""Proposals that are kept of a stream."""


class ProposalPool:
    """A random part of a stream of proposals that fits into `size`, sampled by units.

    The units with the lowest numbers are kept. Numbers are hashes, so the choice does not depend on
    the order or the batches in which units come; a unit is kept whole or not at all.
    """

    def __init__(self, size: int = POOL) -> None:
        self.size, self.seen = size, 0
        self._limit: int | None = None
        self._parts: list[dict[str, Tensor]] = []
        self._held = 0

    def offer(self, columns: Mapping[str, Tensor]) -> None:
        """Add P proposals; those of a unit come at once.

        Args:
            columns: [P, ...] each; `unit` int64 [P].
        """
        self.seen += len(columns["unit"])
        if self._limit is not None:
            below = columns["unit"] < self._limit
            columns = {name: column[below] for name, column in columns.items()}
        self._parts.append({name: column.cpu() for name, column in columns.items()})
        self._held += len(columns["unit"])
        if self._held > 2 * self.size:
            self._shrink()

    def columns(self) -> dict[str, Tensor]:
        """What was kept, in the order of the units; empty if nothing was offered."""
        self._shrink()
        return self._parts[0] if self._parts else {}

    def _shrink(self) -> None:
        if not self._parts:
            return
        whole = {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}
        order = whole["unit"].argsort(stable=True)
        if len(order) > self.size:
            self._limit = int(whole["unit"][order[self.size]])
            order = order[whole["unit"][order] < self._limit]
        self._parts = [{name: column[order] for name, column in whole.items()}]
        self._held = len(order)
