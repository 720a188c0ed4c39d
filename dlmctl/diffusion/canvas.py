"""The sequences being sampled: slots, each with a prompt, its completion, and its progress.

The host knows which positions are masked, the tokens and the steps. So it prepares a step without
asking the device, and waits once, for what the step decided. The device has a copy of the ids,
which the model reads.

R rows are the slots that take part in a step, S all slots, B the block length, G the completion
length, N the positions that a step predicts.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig, tokens_per_step
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent


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

    def to(self, device: torch.device) -> Targets:
        """The same on a device, sent in one piece."""
        if device.type == "cpu":
            return self
        together = torch.stack([part.long() for part in self[1:]])
        row, offset, slot, position, completion, masked = sent(together, device)
        return Targets(self.shape, row, offset, slot, position, completion, masked.bool())

    def at(self, which: Tensor) -> Targets:
        """Some of them, bool [N]."""
        return Targets(self.shape, *(part[which] for part in self[1:]))


class Canvas:
    """Slots of token ids."""

    def __init__(self, policy: Policy, settings: SamplerConfig, slots: int) -> None:
        self.policy, self.settings, self.device = policy, settings, policy.device
        self.blocks = policy.blocks
        self.tokens = torch.full((slots, 0), policy.pad_id)
        """int64 [S, width], prompts and completions."""
        self.ids = torch.full((slots, 0), policy.pad_id, device=self.device)
        """The same on the device."""
        self.masked = self.tokens.bool()
        """bool [S, width], positions of completions that are not decided."""
        # A last block that is cut has up to a block of tokens more.
        self.order = self.tokens.new_zeros(slots, settings.gen_length + settings.block_length)
        self.edits = torch.zeros_like(self.order)
        """How often each token of a completion was replaced."""
        self.keys = torch.zeros(slots, dtype=torch.int64)
        self.owner: list[int | None] = [None] * slots
        """Number of the request in each slot."""
        self.starts, self.block, self.step, self.nfe = ([0] * slots for _ in range(4))
        """For each slot: length of the prompt, current block, step in the block, forward passes."""
        self.edit_steps = [0] * slots
        """For each slot: steps in the block since nothing is masked."""

    @property
    def width(self) -> int:
        return self.tokens.shape[1]

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
        with ancestral sampling the probability of each, float64; on the host."""
        dtype = torch.float64 if self.settings.ancestral else torch.int64
        plans = [(self.quota(slot), self.step[slot]) for slot in rows]
        # Steps beyond the plan find nothing masked, and only edit.
        numbers = [plan[step] if step < len(plan) else 0 for plan, step in plans]
        return torch.tensor(numbers, dtype=dtype)

    def add(self, number: int, request: Request) -> int:
        """Put a request into the first free slot; returns the slot."""
        slot, start = self.owner.index(None), len(request.prompt)
        self.starts[slot] = start
        length = self.length(slot)
        if (more := length - self.width) > 0:
            self.tokens = functional.pad(self.tokens, (0, more), value=self.policy.pad_id)
            self.ids = functional.pad(self.ids, (0, more), value=self.policy.pad_id)
            self.masked = functional.pad(self.masked, (0, more))
        self.tokens[slot] = self.policy.pad_id
        self.tokens[slot, :start] = torch.tensor(request.prompt, dtype=torch.int64)
        self.tokens[slot, start:length] = self.policy.mask_id or 0
        self.masked[slot] = False
        self.masked[slot, start:length] = True
        self.ids[slot] = sent(self.tokens[slot], self.device)
        self.order[slot], self.edits[slot] = 0, 0
        self.keys[slot] = request.key
        self.owner[slot] = number
        self.block[slot] = self.step[slot] = self.nfe[slot] = self.edit_steps[slot] = 0
        return slot

    def window(self, slot: int) -> tuple[int, int]:
        """First position of a row's block, and the one after its last."""
        start = self.first_block(slot) + self.block[slot] * self.settings.block_length
        return start, min(start + self.settings.block_length, self.length(slot))

    def targets(self, rows: Sequence[int]) -> Targets:
        """The positions that are still masked in the block of each row, and with editing those that
        are decided, the prompt's excepted; on the host."""
        slots = torch.tensor(rows)  # [R]
        windows = torch.tensor([self.window(slot) for slot in rows])  # [R, 2]
        offsets = torch.arange(self.settings.block_length)
        columns = windows[:, :1] + offsets  # [R, B]
        starts = torch.tensor([self.starts[slot] for slot in rows])  # [R]
        inside = (columns >= starts[:, None]) & (columns < windows[:, 1:])
        # The last block may be shorter: columns behind it are clamped here, and not inside.
        is_masked = self.masked[slots[:, None], columns.clamp(max=self.width - 1)] & inside
        predicted = is_masked & self._eligible(rows, is_masked)
        if self.settings.editing:
            predicted |= inside & ~is_masked & ~self._settled(columns, starts)
        row, offset = predicted.nonzero(as_tuple=True)  # [N], [N]
        position = columns[row, offset]
        completion, masked = position - starts[row], is_masked[row, offset]
        shape = (len(rows), self.settings.block_length)
        return Targets(shape, row, offset, slots[row], position, completion, masked)

    def _settled(self, columns: Tensor, starts: Tensor) -> Tensor:
        """bool [R, B]: positions that a clean token predicts, so that nothing new is learnt of them
        after they are decided."""
        leads = None
        if self.blocks is not None:
            leads = self.blocks.leads(columns, starts, self.policy.shift)
        return torch.zeros_like(columns, dtype=torch.bool) if leads is None else leads

    def _eligible(self, rows: Sequence[int], is_masked: Tensor) -> Tensor:
        """bool [R, B]: the positions of the part of each block that a step decides."""
        offsets = torch.arange(self.settings.block_length)
        part = self.settings.sub_block_length or self.settings.block_length
        first = is_masked.long().argmax(dim=1, keepdim=True)  # [R, 1]
        eligible = offsets // part == first // part
        if self._first_alone:
            begins = torch.tensor([self.step[slot] == 0 for slot in rows])
            eligible &= (offsets == 0) | ~((first[:, 0] == 0) & begins)[:, None]
        return eligible

    def step_numbers(self, rows: Sequence[int]) -> list[int]:
        """Steps counted as if every block took all its steps, so that the noise of a step does not
        depend on how many steps earlier blocks took."""
        per_block = self.steps_per_block
        return [self.block[slot] * per_block + self.step[slot] for slot in rows]

    def replaced(self, targets: Targets, token: Tensor, sure: Tensor) -> Tensor:
        """bool [N]: decided positions whose new token is another, and more probable than
        `edit_threshold`.

        Args:
            token, sure: int64 and float64 [N], as `predict_tokens` returns them.
        """
        differs = token != self.ids[targets.slot, targets.position]
        return ~targets.masked & differs & (sure > self.settings.edit_threshold)

    def write(self, targets: Targets, written: Tensor, token: Tensor) -> None:
        """Write some of the tokens [N], bool [N], into the ids of the device."""
        place = targets.slot, targets.position
        self.ids[place] = torch.where(written, token, self.ids[place])

    def decide(
        self, targets: Targets, written: Tensor, token: Tensor, steps: Sequence[int]
    ) -> None:
        """Note what `write` wrote, decided at these steps of the R rows; all on the host."""
        [index] = written.nonzero(as_tuple=True)
        slot, completion = targets.slot[index], targets.completion[index]
        place = slot, targets.position[index]
        self.tokens[place] = token[index]
        self.masked[place] = False
        self.order[slot, completion] = torch.tensor(steps)[targets.row[index]]
        self.edits[slot, completion] += ~targets.masked[index]

    def advance(
        self, rows: Sequence[int], passes: int, again: Sequence[bool], changed: Set[int]
    ) -> list[int]:
        """Move each row to its next step or block; rows in `again` repeat their step.

        Args:
            changed: with editing, the numbers among R of the rows that the step wrote to.

        Returns:
            The slots whose completion is done.
        """
        done = []
        for row, slot in enumerate(rows):
            self.nfe[slot] += passes
            self.step[slot] += not again[row]
            start, stop = self.window(slot)
            if self.masked[slot, start:stop].any():
                continue
            if row in changed and self.edit_steps[slot] < self.settings.edit_steps:
                self.edit_steps[slot] += 1
                continue
            stopped = self.settings.early_stop and self._stop_at_eos(slot)
            self.block[slot] += 1
            self.step[slot] = self.edit_steps[slot] = 0
            if stopped or stop >= self.length(slot):
                done.append(slot)
        return done

    def _stop_at_eos(self, slot: int) -> bool:
        """Fill the rest of a row whose decided part contains end-of-sequence."""
        eos, start, stop = self.policy.eos_id, self.starts[slot], self.window(slot)[1]
        decided = self.tokens[slot, start:stop].tolist()
        if eos is None or self.policy.ends.isdisjoint(decided):
            return False
        self.tokens[slot, stop : self.length(slot)] = eos
        last = (self.block[slot] + 1) * self.steps_per_block - 1
        self.order[slot, stop - start :] = last
        return True

    def take(self, slot: int) -> tuple[int, Sample]:
        """Number and completion of a slot that is done; the slot becomes free."""
        number = self.owner[slot]
        assert number is not None
        self.owner[slot] = None
        start, length = self.starts[slot], self.settings.gen_length
        tokens = self.tokens[slot, start : start + length].tolist()
        order, edits = self.order[slot, :length].tolist(), None
        if self.settings.editing:
            edits = int(self.edits[slot, :length].sum())
        return number, Sample(tokens, order, self.nfe[slot], edits=edits)

    def tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Numbers as int64 on the device."""
        return sent(torch.tensor(values, dtype=torch.int64), self.device)
