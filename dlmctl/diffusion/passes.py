"""Forward passes of a denoising step: as few tokens as the settings allow, little of it padding.

A block-causal model passes over the text to the end of the present block. Keys and values of
finished blocks never change, so that they need one pass: the first step of a block passes over the
block before, now without masks, and itself; the others over itself.

R rows take part in a pass, each with Q tokens; T is the longest sequence among them, S all slots of
the canvas, N the targets of the step, H the width of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import compress

import torch
from torch import Tensor

from dlmctl.diffusion.cache import SlotCache, check_cache
from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.canvas import Canvas, Targets
from dlmctl.diffusion.noise import subkeys
from dlmctl.diffusion.proposals import latent
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent

SMALL_PASS = 2048
"""Tokens below which a pass is not split to save padding."""

LITTLE_PADDING = 7 / 8
"""The shortest row of a pass is at least this part of the longest, unless the pass is small."""


def buckets(lengths: Sequence[int]) -> Iterator[slice]:
    """Runs of neighbours of like length; `lengths` falls."""
    first = 0
    for index, length in enumerate(lengths):
        full = (index - first) * lengths[first] >= SMALL_PASS
        if full and length < LITTLE_PADDING * lengths[first]:
            yield slice(first, index)
            first = index
    if lengths:
        yield slice(first, len(lengths))


class Passes:
    """Hidden states of a step's targets, with the passes that the settings ask for."""

    def __init__(
        self, policy: Policy, settings: SamplerConfig, canvas: Canvas, callback: SamplerCallback
    ) -> None:
        self.policy, self.settings, self.canvas, self.callback = policy, settings, canvas, callback
        self.cache: SlotCache | None = None
        if settings.cached:
            check_cache(policy)
            self.cache = SlotCache(len(canvas.owner))
        self._hidden = partial(policy.hidden, compiled=settings.compile)
        self.per_step = 2 if settings.cfg_scale > 0 else 1
        self._outdated: set[int] = set()
        """Slots whose next pass goes over the whole sequence."""

    def states(self, rows: Sequence[int], targets: Targets) -> list[Tensor]:
        """Hidden states [N, H] in which the logits of the targets stand.

        Args:
            rows: slots, the longest sequences first.
            targets: on the host.

        Returns:
            One tensor; with guidance a second, of the model that does not see the prompt.
        """
        canvas, cache = self.canvas, self.cache
        if cache is not None:
            cache.widen(canvas.width)
        # 1. Every part is numbers [n] among the targets, on the host, and states, each [n, H].
        whole = [slot for slot in rows if self._renews(slot)]
        whole.sort(key=lambda slot: -self._end(slot))
        parts = []
        for run in buckets([self._end(slot) for slot in whole]):
            parts.append(self._whole(whole[run], targets))
        # In the order of their slots, for the cache.
        rest = sorted(slot for slot in rows if not self._renews(slot))
        if rest:
            parts.append(self._part(rest, targets))
        # 2. Put the parts back into the order of the targets.
        if len(parts) == 1:
            return parts[0][1]
        where = sent(torch.cat([picked for picked, _ in parts]), canvas.device)  # [N]
        results = []
        for number in range(self.per_step):
            states = torch.cat([hidden[number] for _, hidden in parts])
            results.append(torch.empty_like(states).index_copy_(0, where, states))
        return results

    def _renews(self, slot: int) -> bool:
        """Whether this step of the row passes over its whole sequence."""
        if self.settings.cache == "exact":
            return self.canvas.step[slot] == self.canvas.block[slot] == 0
        interval = self.settings.refresh or self.settings.steps_per_block
        due = self.canvas.step[slot] % interval == 0
        return self.cache is None or due or slot in self._outdated

    def _end(self, slot: int) -> int:
        """Where the passes over a row end: a block-causal model sees nothing behind its block."""
        causal = self.policy.blocks is not None
        return self.canvas.window(slot)[1] if causal else self.canvas.length(slot)

    def _allowed(self, rows: Sequence[int], places: Tensor, there: Tensor) -> Tensor | None:
        """bool [R, Q, T]: what tokens at these places [R, Q] attend to, if it is not all there is.

        Args:
            there: bool [R, T], false for padding.
        """
        if (blocks := self.policy.blocks) is None:
            return None
        starts = self.canvas.tensor([self.canvas.starts[slot] for slot in rows])  # [R]
        windows = self.canvas.tensor([self.canvas.window(slot)[0] for slot in rows])[:, None]
        keys = torch.arange(there.shape[1], device=there.device).expand_as(there)
        noised = places >= windows, keys >= windows  # the present block
        return blocks.attends(places, keys, *noised, starts) & there[:, None]

    def _requests(self, rows: Sequence[int]) -> list[int]:
        """Numbers of the requests in these slots."""
        owners = [self.canvas.owner[slot] for slot in rows]
        return [-1 if owner is None else owner for owner in owners]

    def outdated(self, rows: Sequence[int], surest: Tensor) -> Tensor:
        """bool [R]: rows that reused old keys and values and are too unsure to go on.

        Args:
            surest: float64 [R], the confidence of the most confident token of each row.
        """
        if not self.settings.refresh_below:
            return torch.zeros_like(surest, dtype=torch.bool)
        old = self.canvas.tensor([not self._renews(slot) for slot in rows]).bool()
        return old & (surest < self.settings.refresh_below)

    def repeat(self, rows: Sequence[int], again: Sequence[bool]) -> None:
        """Pass over the whole sequence of the rows in `again` when they repeat their step."""
        self._outdated -= set(rows)
        self._outdated.update(compress(rows, again))

    def _whole(self, rows: Sequence[int], targets: Targets) -> tuple[Tensor, list[Tensor]]:
        """A pass over the whole sequences of these rows; returns as `_pick` does."""
        canvas, device = self.canvas, self.canvas.device
        lengths = canvas.tensor([self._end(slot) for slot in rows])  # [R]
        width = self._end(rows[0])  # T
        ids = canvas.ids[canvas.tensor(rows), :width]  # [R, T]
        ids, mask = self._with_latents(rows, ids)
        columns = torch.arange(width, device=device)  # [T]
        there = columns < lengths[:, None]  # [R, T], false for padding
        allowed = self._allowed(rows, columns.expand(len(rows), -1), there)
        padded = there if self._end(rows[-1]) < width else None
        if self.cache is not None:
            places = columns.expand(len(rows), -1)  # [R, T], where keys and values are stored
            if padded is not None:
                places = places.where(padded, self.cache.width)
            self.cache.aim(rows, places, width, whole=True)
        self.callback.on_pass(rows)
        self.callback.on_rows(self._requests(rows))
        run = partial(self._hidden, attention=padded, allowed=allowed)
        hidden = [run(ids, cache=self.cache)]
        if self.settings.cfg_scale > 0:
            starts = canvas.tensor([canvas.starts[slot] for slot in rows])  # [R]
            blind = torch.where(columns < starts[:, None], mask, ids)
            hidden.append(run(blind))
        return self._pick(rows, hidden, targets, [0] * len(rows))

    def _with_latents(self, rows: Sequence[int], ids: Tensor) -> tuple[Tensor, Tensor | int]:
        """The tokens [R, T] with the mask token of each row in this step, and that, [R, 1]."""
        latents, mask_id = self.policy.latent_masks, self.policy.mask_id or 0
        if not latents:
            return ids, mask_id
        keys = subkeys(self.canvas.keys[rows], torch.tensor(self.canvas.step_numbers(rows)))
        drawn = torch.tensor(latents)[latent(keys, len(latents))]  # [R]
        mask = sent(drawn, ids.device)[:, None]
        return torch.where(ids == mask_id, mask, ids), mask

    def _part(self, rows: Sequence[int], targets: Targets) -> tuple[Tensor, list[Tensor]]:
        """The same for a pass over the block (dual), the block and what follows it (prefix), or
        the block and, in its first step, the one before (exact)."""
        canvas, cache, device = self.canvas, self.cache, self.canvas.device
        assert cache is not None
        # 1. Row r passes over the positions firsts[r] to ends[r]. The logits of the block's first
        #    position are up to one position before it, so the pass begins there.
        windows = [canvas.window(slot) for slot in rows]
        blocks, shift = self.policy.blocks, self.policy.shift
        more = shift if blocks is None else blocks.reach(shift)
        before = [more] * len(rows)
        if self.settings.cache == "exact":
            block = self.settings.block_length
            before = [block if canvas.step[slot] == 0 else more for slot in rows]
        begins = [max(0, start - more) for (start, _), more in zip(windows, before, strict=True)]
        lasts = [self._end(slot) for slot in rows]
        stops = [stop for _, stop in windows] if self.settings.cache == "dual" else lasts
        queries = max(stop - begin for begin, stop in zip(begins, stops, strict=True))  # Q
        longest = max(lasts)  # T
        firsts, ends, lengths = canvas.tensor([begins, stops, lasts])  # [R] each
        columns = firsts[:, None] + torch.arange(queries, device=device)  # [R, Q]
        inside = columns < ends[:, None]  # [R, Q], false for padding
        places = columns.clamp(max=longest - 1)  # [R, Q]; padding repeats a token
        # 2. Keys and values of padding go to the last column of the cache, which nothing reads.
        slots = canvas.tensor(rows)  # [R]
        cache.aim(rows, columns.where(inside, cache.width), longest, whole=False)
        there = torch.arange(longest, device=device) < lengths[:, None]  # [R, T]
        allowed = self._allowed(rows, places, there)
        padded = there if min(lasts) < longest else None
        ids = canvas.ids[slots[:, None], places]
        self.callback.on_rows(self._requests(rows))
        hidden = self._hidden(ids, padded, places, cache, allowed=allowed)
        return self._pick(rows, [hidden], targets, begins)

    def _pick(
        self, rows: Sequence[int], hidden: list[Tensor], targets: Targets, firsts: Sequence[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """The hidden states of the targets that these rows have.

        Args:
            hidden: states [R, Q, H]; row r begins at position firsts[r].

        Returns:
            Numbers [n] of these targets among the N, on the host, and a tensor [n, H] for each of
            `hidden`.
        """
        # local[slot] is the row of a slot in this pass, or -1.
        local = torch.full((len(self.canvas.owner),), -1)  # [S]
        local[torch.tensor(rows)] = torch.arange(len(rows))
        row = local[targets.slot]  # [N]
        [picked] = (row >= 0).nonzero(as_tuple=True)
        row, position = row[picked], targets.position[picked]  # [n]
        place = self.policy.source(position)
        if (blocks := self.policy.blocks) is not None:
            starts = torch.tensor([self.canvas.starts[slot] for slot in rows])[row]  # [n]
            leads = blocks.leads(position[:, None], starts, self.policy.shift)  # [n, 1]
            place = place if leads is None else (position - 1).where(leads[:, 0], place)
        place = place - torch.tensor(firsts)[row]  # in the pass
        row, place = sent(torch.stack([row, place]), self.canvas.device)
        return picked, [states[row, place] for states in hidden]
