"""Keys and values of earlier steps, for denoising steps that look at a part of the sequence only.

A masked diffusion model attends in both directions, so every token that is decided changes the keys
and values of all others, if only a little. Fast-dLLM (arXiv 2505.22618) reuses the old ones for
everything outside the current block, and renews them when the next block begins:

A block-causal model has an exact cache: what is behind a block changes nothing in it.

    pass over      whole sequence        every `refresh` steps, and when a block begins
                   block and what follows       cache "prefix"
                   block alone                  cache "dual"
                   block alone, and once the one before, now without masks     cache "exact"

Each row is at its own step of its own block; its keys and values are in a slot of one tensor for
each layer. To transformers this is a `Cache`, so the models need no change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent
from dlmctl.records.errors import UsageError


class SlotCache(Cache):
    """Keys and values [slots, heads, width + 1, d] of each layer; the last column: padding."""

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.slots = slots
        self.width = 0
        self._stores: list[tuple[Tensor, Tensor]] = []

    def widen(self, width: int) -> None:
        """Make room for sequences of this length; what is stored stays."""
        if width <= self.width:
            return
        for index, pair in enumerate(self._stores):
            fresh = tuple(
                old.new_zeros(*old.shape[:2], width + 1, old.shape[3]).index_copy_(
                    2, torch.arange(self.width, device=old.device), old[:, :, : self.width]
                )
                for old in pair
            )
            self._stores[index] = (fresh[0], fresh[1])
        self.width = width

    def aim(self, slots: Sequence[int], columns: Tensor, length: int, whole: bool) -> None:
        """Say what the next pass contains.

        Args:
            slots: those of its R rows.
            columns: int64 [R, Q], the positions of its tokens; `width` for padding.
            length: columns that its queries attend to.
            whole: whether it contains all tokens of its rows, so that it needs no older keys.
        """
        self._rows = sent(torch.tensor(slots), columns.device)  # [R]
        self._columns, self._length, self._whole = columns, length, whole
        # What consecutive slots have stored is read where it is, and not gathered in each layer.
        consecutive = list(slots) == list(range(slots[0], slots[0] + len(slots)))
        self._read = slice(slots[0], slots[0] + len(slots)) if consecutive else self._rows

    @property
    def padding(self) -> Tensor:
        """bool [R, Q], true for padding in the pass aimed at."""
        return self._columns == self.width

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, heads, Q, d]; return those that the queries attend to."""
        if layer_idx == len(self._stores):
            shape = (self.slots, key_states.shape[1], self.width + 1, key_states.shape[3])
            self._stores.append((key_states.new_zeros(shape), value_states.new_zeros(shape)))
        seen = []
        for store, fresh in zip(self._stores[layer_idx], (key_states, value_states), strict=True):
            store[self._rows[:, None], :, self._columns] = fresh.transpose(1, 2)
            seen.append(fresh if self._whole else store[self._read, :, : self._length])
        return seen[0], seen[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return (query_length if self._whole else self._length), 0


def check_cache(policy: Policy) -> None:
    """Raise UsageError if a model cannot reuse keys and values of an earlier pass."""
    if not policy.reuses_keys:
        raise UsageError(
            f"--cache is for models whose layers all attend to the whole sequence and are built as "
            f"decoders (LLaDA, Dream, a2d); {policy.name} is not one: leave it out"
        )
