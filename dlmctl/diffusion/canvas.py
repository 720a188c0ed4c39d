"""The sequences under way: slots, each with a prompt, its completion, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig
from dlmctl.models.policy import Policy


class Masked(NamedTuple):
    """The N masked positions in the blocks of R rows."""

    shape: tuple[int, int]
    """R and the block length."""
    row: Tensor
    """int64 [N], which of the R rows."""
    offset: Tensor
    """int64 [N], place in the block."""
    slot: Tensor
    """int64 [N]."""
    position: Tensor
    """int64 [N], place in the sequence."""
    completion: Tensor
    """int64 [N], place in the completion."""


class Canvas:
    """Slots of token ids; the host knows where each row stands, the device what it holds."""

    def __init__(self, policy: Policy, settings: SamplerConfig, slots: int) -> None:
        self.policy, self.settings, self.device = policy, settings, policy.device
        self.ids = torch.full((slots, 0), policy.pad_id, dtype=torch.int64, device=self.device)
        self.order = self.ids.new_zeros(slots, settings.gen_length)
        self.keys = self.ids.new_zeros(slots)
        self.owner: list[int | None] = [None] * slots
        """Number of the request in each slot."""
        self.starts, self.block, self.step, self.nfe = ([0] * slots for _ in range(4))
        """Length of the prompt; block; step in the block; forward passes so far."""

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def free(self) -> list[int]:
        return [slot for slot, owner in enumerate(self.owner) if owner is None]

    @property
    def active(self) -> list[int]:
        """Slots under way, the longest sequences first."""
        taken = [slot for slot, owner in enumerate(self.owner) if owner is not None]
        return sorted(taken, key=lambda slot: -self.starts[slot])

    def length(self, slot: int) -> int:
        """Tokens of prompt and completion."""
        return self.starts[slot] + self.settings.gen_length

    def add(self, number: int, request: Request) -> int:
        """Begin a request in the first free slot, and say which that is."""
        slot, start = self.owner.index(None), len(request.prompt)
        length = start + self.settings.gen_length
        if length > self.width:
            more = self.ids.new_full((len(self.owner), length - self.width), self.policy.pad_id)
            self.ids = torch.cat([self.ids, more], dim=1)
        row = torch.full((self.width,), self.policy.pad_id, dtype=torch.int64)
        row[:start] = torch.tensor(request.prompt, dtype=torch.int64)
        row[start:length] = self.policy.mask_id or 0
        self.ids[slot] = row.to(self.device)
        self.order[slot], self.keys[slot] = 0, request.key
        self.owner[slot], self.starts[slot] = number, start
        self.block[slot] = self.step[slot] = self.nfe[slot] = 0
        return slot

    def window(self, slot: int) -> tuple[int, int]:
        """First position of a row's block, and the one after its last."""
        start = self.block[slot] * self.settings.block_length
        stop = min(start + self.settings.block_length, self.settings.gen_length)
        return self.starts[slot] + start, self.starts[slot] + stop

    def masked(self, rows: Sequence[int]) -> Masked:
        """What is still to be decided in the block of each row."""
        slots = self.tensor(rows)
        windows = self.tensor([self.window(slot) for slot in rows])
        columns = windows[:, :1] + torch.arange(self.settings.block_length, device=self.device)
        now = self.ids[slots[:, None], columns.clamp(max=self.width - 1)]
        hidden = (now == self.policy.mask_id) & (columns < windows[:, 1:])
        row, offset = hidden.nonzero(as_tuple=True)
        slot, position = slots[row], columns[row, offset]
        completion = position - self.tensor([self.starts[slot] for slot in rows])[row]
        shape = (len(rows), self.settings.block_length)
        return Masked(shape, row, offset, slot, position, completion)

    def numbered_steps(self, rows: Sequence[int]) -> Tensor:
        """int64 [R], counted as if every block took all its steps, so that neighbours do not
        matter."""
        per_block = self.settings.steps_per_block
        return self.tensor([self.block[slot] * per_block + self.step[slot] for slot in rows])

    def decide(self, masked: Masked, stays: Tensor, token: Tensor, steps: Tensor) -> None:
        """Write the tokens that stay, bool [N]; steps [R] are those they were decided at."""
        slot = masked.slot[stays]
        self.ids[slot, masked.position[stays]] = token[stays]
        self.order[slot, masked.completion[stays]] = steps[masked.row[stays]]

    def advance(
        self, rows: Sequence[int], passes: int, blocks_done: Sequence[bool], again: Sequence[bool]
    ) -> list[int]:
        """To the next step, or block, but for rows that take the same step again.

        Returns:
            The slots whose completion is done.
        """
        done = []
        for slot, block_done, repeats in zip(rows, blocks_done, again, strict=True):
            self.nfe[slot] += passes
            self.step[slot] += not repeats
            if not block_done:
                continue
            stopped = self.settings.early_stop and self._stop_at_eos(slot)
            self.block[slot] += 1
            self.step[slot] = 0
            if stopped or self.block[slot] == self.settings.blocks:
                done.append(slot)
        return done

    def _stop_at_eos(self, slot: int) -> bool:
        """Fill the rest of a row whose decided part holds end-of-sequence."""
        eos, start, stop = self.policy.eos_id, self.starts[slot], self.window(slot)[1]
        decided = self.ids[slot, start:stop].tolist()
        if eos is None or self.policy.ends.isdisjoint(decided):
            return False
        self.ids[slot, stop : self.length(slot)] = eos
        last = (self.block[slot] + 1) * self.settings.steps_per_block - 1
        self.order[slot, stop - start :] = last
        return True

    def take(self, slot: int) -> tuple[int, Sample]:
        """Number and completion of a slot that is done; it is free again."""
        number = self.owner[slot]
        assert number is not None
        self.owner[slot] = None
        tokens = self.ids[slot, self.starts[slot] : self.length(slot)].tolist()
        return number, Sample(tokens, self.order[slot].tolist(), self.nfe[slot])

    def tensor(self, values: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
