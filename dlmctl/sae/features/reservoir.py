"""The best of a stream for each of many slots, in memory that does not grow with the stream.

What is kept depends on the candidates and not on the order or the batches in which they come. A
slot keeps at most one candidate of a document, so that it keeps different texts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Reservoir:
    """The `size` candidates of highest score of each slot; on a tie the earlier document's."""

    def __init__(self, slots: int, size: int) -> None:
        self.size = size
        self.score = torch.full((slots * size,), -torch.inf, dtype=torch.float64)
        """[slots * size], descending within a slot; -inf for an empty place."""
        self.number = torch.full((slots * size,), -1)
        """int64 [slots * size], the documents."""
        self.content: dict[str, Tensor] = {}
        """[slots * size, ...] by name."""

    def offer(
        self,
        slot: Tensor,
        score: Tensor,
        number: Tensor,
        fill: Callable[[Tensor], dict[str, Tensor]],
    ) -> None:
        """Keep those of P candidates that are good enough; all of a document come at once.

        Args:
            slot: int64 [P].
            score: [P], finite.
            number: int64 [P], the document of each; of two with equal scores the first is taken.
            fill: content [C, ...] by name of the C candidates with these numbers, int64 [C].
        """
        lowest = self.score[self.size - 1 :: self.size]
        taken = (score >= lowest[slot]).nonzero().squeeze(1)
        taken = taken[_best_of_each(slot[taken], number[taken], score[taken])]
        taken = taken[_best(slot[taken], number[taken], score[taken], self.size)]
        if not len(taken):
            return
        slots = slot[taken].unique()
        places = (slots[:, None] * self.size + torch.arange(self.size)).flatten()
        scores = torch.cat([self.score[places], score[taken].double()])
        numbers = torch.cat([self.number[places], number[taken]])
        all_slots = torch.cat([slots.repeat_interleave(self.size), slot[taken]])
        kept = _best(all_slots, numbers, scores, self.size)
        self.score[places], self.number[places] = scores[kept], numbers[kept]
        for name, new in fill(taken).items():
            if name not in self.content:
                self.content[name] = new.new_zeros(len(self.score), *new.shape[1:])
            old = self.content[name]
            old[places] = torch.cat([old[places], new])[kept]

    def places(self, slot: int) -> list[int]:
        """Indices of the entries of a slot, the best first."""
        first = slot * self.size
        count = int((self.score[first : first + self.size] > -torch.inf).sum())
        return list(range(first, first + count))


def _best(slot: Tensor, number: Tensor, score: Tensor, size: int) -> Tensor:
    """Indices of the best `size` of each slot, slot by slot, the best first."""
    order = number.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[slot[order].argsort(stable=True)]
    sorted_slots = slot[order]
    rank = torch.arange(len(order)) - torch.searchsorted(sorted_slots, sorted_slots)
    return order[rank < size]


def _best_of_each(slot: Tensor, number: Tensor, score: Tensor) -> Tensor:
    """Index of the highest score of each slot and document."""
    order = score.argsort(descending=True, stable=True)
    order = order[number[order].argsort(stable=True)]
    order = order[slot[order].argsort(stable=True)]
    same = (slot[order].diff() == 0) & (number[order].diff() == 0)
    return order[torch.cat([same.new_ones(min(1, len(order))), ~same])]
