"""The sequences being sampled: slots, each with a prompt, its completion, and its progress.

R rows are the slots that take part in a step, S all slots, B the block length, G the completion
length, N the positions that a step predicts.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig, tokens_per_step
from dlmctl.models.policy import Policy


class Targets(NamedTuple):
    """The N positions that a step predicts in the blocks of R rows, each by its five coordinates:
    masked ones, and with editing those that are decided."""

    shape: tuple[int, int]
    """R and B."""
    row: Tensor
    """int64 [N], index among the R rows."""
    offset: Tensor
    """int64 [N], index in the block."""
    slot: Tensor
    """int64 [N], index among the S slots."""
    position: Tensor
    """int64 [N], index in the sequence, prompt included."""
    completion: Tensor
    """int64 [N], index in the completion."""
    masked: Tensor
    """bool [N], false for those that are decided."""
    waiting: Tensor
    """bool [R]: rows with further masked positions in their block, which this step leaves."""


class Canvas:
    """Slots of token ids. Progress is kept on the host, ids on the device."""

    def __init__(self, policy: Policy, settings: SamplerConfig, slots: int) -> None:
        self.policy, self.settings, self.device = policy, settings, policy.device
        self.blocks = policy.blocks
        self.ids = torch.full((slots, 0), policy.pad_id, dtype=torch.int64, device=self.device)
        # A last block that is cut has up to a block of tokens more.
        self.order = self.ids.new_zeros(slots, settings.gen_length + settings.block_length)
        self.edits = torch.zeros_like(self.order)
        """How often each token of a completion was replaced."""
        self.keys = self.ids.new_zeros(slots)
        self.owner: list[int | None] = [None] * slots
        """Number of the request in each slot."""
        self.starts, self.block, self.step, self.nfe = ([0] * slots for _ in range(4))
        """For each slot: length of the prompt, current block, step in the block, forward passes."""
        self.edit_steps = [0] * slots
        """For each slot: steps in the block since nothing is masked."""

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    @property
    def free(self) -> list[int]:
        return [slot for slot, owner in enumerate(self.owner) if owner is None]

    @property
    def active(self) -> list[int]:
        """Slots that are taken, the longest sequences first."""
        taken = [slot for slot, owner in enumerate(self.owner) if owner is not None]
        return sorted(taken, key=lambda slot: -self.starts[slot])

    def length(self, slot: int) -> int:
        """Tokens of prompt and completion, to the end of the last block."""
        length = self.starts[slot] + self.settings.gen_length
        return length if self.blocks is None else self.blocks.whole(length)

    def first_block(self, slot: int) -> int:
        """Where the completion's first block begins."""
        start = self.starts[slot]
        return start if self.blocks is None else self.blocks.first(start)

    @property
    def steps_per_block(self) -> int:
        """The most that a block takes."""
        deciding = max(self.settings.steps_per_block, 2 if self._first_alone else 1)
        return deciding + (self.settings.edit_steps if self.settings.editing else 0)

    @property
    def _first_alone(self) -> bool:
        return self.blocks is not None and self.blocks.first_alone

    def quota(self, slot: int) -> Sequence[float]:
        """Tokens that each step of the present block of a row decides, if not fewer are left.

        Where the last block is sampled whole, every block has the plan of a whole one, though it
        may begin with the end of the prompt.
        """
        begin, stop = self.window(slot)
        left = stop - max(begin, self.starts[slot])
        if self.blocks is not None and self.blocks.cut:
            left = self.blocks.length
        steps = self.settings.steps_per_block
        if not self._first_alone or begin < self.starts[slot]:
            return self.settings.per_step(left)
        return [1, *tokens_per_step(left - 1, max(1, steps - 1))]

    def skip_idle_steps(self, rows: Sequence[int]) -> None:
        """Move each row to its next step that decides a token, if `SamplerConfig.idles`."""
        for slot in rows if self.settings.idles else ():
            plan = self.quota(slot)
            while not plan[self.step[slot]]:
                self.step[slot] += 1

    def quotas(self, rows: Sequence[int]) -> Tensor:
        """[R]: tokens that the present step of each row decides, if not fewer are left, int64;
        with ancestral sampling the probability of each, float64."""
        dtype = torch.float64 if self.settings.ancestral else torch.int64
        plans = [(self.quota(slot), self.step[slot]) for slot in rows]
        # Steps beyond the plan find nothing masked, and only edit.
        numbers = [plan[step] if step < len(plan) else 0 for plan, step in plans]
        return torch.tensor(numbers, dtype=dtype).to(self.device, non_blocking=True)

    def add(self, number: int, request: Request) -> int:
        """Put a request into the first free slot; returns the slot."""
        slot, start = self.owner.index(None), len(request.prompt)
        self.starts[slot] = start
        length = self.length(slot)
        if length > self.width:
            more = self.ids.new_full((len(self.owner), length - self.width), self.policy.pad_id)
            self.ids = torch.cat([self.ids, more], dim=1)
        row = torch.full((self.width,), self.policy.pad_id, dtype=torch.int64)
        row[:start] = torch.tensor(request.prompt, dtype=torch.int64)
        row[start:length] = self.policy.mask_id or 0
        self.ids[slot] = row.to(self.device)
        self.order[slot], self.edits[slot], self.keys[slot] = 0, 0, request.key
        self.owner[slot] = number
        self.block[slot] = self.step[slot] = self.nfe[slot] = self.edit_steps[slot] = 0
        return slot

    def window(self, slot: int) -> tuple[int, int]:
        """First position of a row's block, and the one after its last."""
        start = self.first_block(slot) + self.block[slot] * self.settings.block_length
        return start, min(start + self.settings.block_length, self.length(slot))

    def targets(self, rows: Sequence[int]) -> Targets:
        """The positions that are still masked in the block of each row, and with editing those that
        are decided, the prompt's excepted."""
        slots = self.tensor(rows)  # [R]
        windows = self.tensor([self.window(slot) for slot in rows])  # [R, 2]
        offsets = torch.arange(self.settings.block_length, device=self.device)
        columns = windows[:, :1] + offsets  # [R, B]
        # The last block may be shorter: columns behind it are clamped here and left out below.
        ids = self.ids[slots[:, None], columns.clamp(max=self.width - 1)]  # [R, B]
        starts = self.tensor([self.starts[slot] for slot in rows])  # [R]
        inside = (columns >= starts[:, None]) & (columns < windows[:, 1:])
        is_masked = (ids == self.policy.mask_id) & inside
        chosen = is_masked & self._eligible(rows, is_masked)
        predicted = chosen
        if self.settings.editing:
            predicted = chosen | (inside & ~is_masked & ~self._settled(columns, starts))
        row, offset = predicted.nonzero(as_tuple=True)  # [N], [N]
        slot, position = slots[row], columns[row, offset]
        completion = position - starts[row]
        shape = (len(rows), self.settings.block_length)
        waiting = (is_masked & ~chosen).any(dim=1)
        masked = is_masked[row, offset]
        return Targets(shape, row, offset, slot, position, completion, masked, waiting)

    def _settled(self, columns: Tensor, starts: Tensor) -> Tensor:
        """bool [R, B]: positions that a clean token predicts, so that nothing new is learnt of them
        after they are decided."""
        leads = None
        if self.blocks is not None:
            leads = self.blocks.leads(columns, starts, self.policy.shift)
        return torch.zeros_like(columns, dtype=torch.bool) if leads is None else leads

    def _eligible(self, rows: Sequence[int], is_masked: Tensor) -> Tensor:
        """bool [R, B]: the positions of the part of each block that a step decides."""
        offsets = torch.arange(self.settings.block_length, device=self.device)
        part = self.settings.sub_block_length or self.settings.block_length
        first = is_masked.long().argmax(dim=1, keepdim=True)  # [R, 1]
        eligible = offsets // part == first // part
        if self._first_alone:
            begins = self.tensor([self.step[slot] == 0 for slot in rows])
            eligible &= (offsets == 0) | ~((first[:, 0] == 0) & (begins == 1))[:, None]
        return eligible

    def numbered_steps(self, rows: Sequence[int]) -> Tensor:
        """int64 [R]: steps counted as if every block took all its steps, so that the noise of a
        step does not depend on how many steps earlier blocks took."""
        per_block = self.steps_per_block
        return self.tensor([self.block[slot] * per_block + self.step[slot] for slot in rows])

    def replaced(self, targets: Targets, token: Tensor, sure: Tensor) -> Tensor:
        """bool [N]: decided positions whose new token is another, and more probable than
        `edit_threshold`.

        Args:
            token, sure: int64 and float64 [N], as `predict_tokens` returns them.
        """
        differs = token != self.ids[targets.slot, targets.position]
        return ~targets.masked & differs & (sure > self.settings.edit_threshold)

    def decide(self, targets: Targets, written: Tensor, token: Tensor, steps: Tensor) -> None:
        """Write some of the tokens [N], bool [N], decided at `steps` [R]."""
        [index] = written.nonzero(as_tuple=True)
        slot, completion = targets.slot[index], targets.completion[index]
        self.ids[slot, targets.position[index]] = token[index]
        self.order[slot, completion] = steps[targets.row[index]]
        self.edits[slot, completion] += ~targets.masked[index]

    def advance(
        self,
        rows: Sequence[int],
        passes: int,
        decided: Sequence[bool],
        again: Sequence[bool],
        changed: Set[int],
    ) -> list[int]:
        """Move each row to its next step or block; rows in `again` repeat their step.

        Args:
            decided: whether nothing is masked in the block of a row.
            changed: with editing, the numbers among R of the rows that the step wrote to.

        Returns:
            The slots whose completion is done.
        """
        done = []
        for row, slot in enumerate(rows):
            self.nfe[slot] += passes
            self.step[slot] += not again[row]
            if not decided[row]:
                continue
            if row in changed and self.edit_steps[slot] < self.settings.edit_steps:
                self.edit_steps[slot] += 1
                continue
            stopped = self.settings.early_stop and self._stop_at_eos(slot)
            self.block[slot] += 1
            self.step[slot] = self.edit_steps[slot] = 0
            if stopped or self.window(slot)[0] >= self.length(slot):
                done.append(slot)
        return done

    def _stop_at_eos(self, slot: int) -> bool:
        """Fill the rest of a row whose decided part contains end-of-sequence."""
        eos, start, stop = self.policy.eos_id, self.starts[slot], self.window(slot)[1]
        decided = self.ids[slot, start:stop].tolist()
        if eos is None or self.policy.ends.isdisjoint(decided):
            return False
        self.ids[slot, stop : self.length(slot)] = eos
        last = (self.block[slot] + 1) * self.steps_per_block - 1
        self.order[slot, stop - start :] = last
        return True

    def take(self, slot: int) -> tuple[int, Sample]:
        """Number and completion of a slot that is done; the slot becomes free."""
        number = self.owner[slot]
        assert number is not None
        self.owner[slot] = None
        start, length = self.starts[slot], self.settings.gen_length
        tokens = self.ids[slot, start : start + length].tolist()
        order, edits = self.order[slot, :length].tolist(), None
        if self.settings.editing:
            edits = int(self.edits[slot, :length].sum())
        return number, Sample(tokens, order, self.nfe[slot], edits=edits)

    def tensor(self, values: Sequence[int] | Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self.device, non_blocking=True)
