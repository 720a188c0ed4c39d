"""Which positions a position attends to: attention patterns, and the rows that noise is scored in.

A pattern is causal, bidirectional or block-causal. The first two need no mask: transformers builds
them. A block-causal model reads a text in blocks of B tokens. A token attends to its own block, in
both directions, and to all of the blocks before:

    clean token of block q     clean keys of blocks k <= q
    noised token of block q    clean keys of blocks k <  q, noised keys of block q

The second line is how block diffusion is trained and scored (BD3LM, arXiv 2503.09573, section 4 and
appendix B.6): a row is the clean text followed by a noised copy, so that one pass gives what a
model predicts for every block after its clean past. `Blocks.attends` alone writes these masks.

R rows, T tokens of a text, Q queries, K keys, N tokens asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from dlmctl.models.sending import sent

Pattern = Literal["causal", "bidirectional", "block-causal"]
Lengths = TypeVar("Lengths", int, Tensor)
Narrowing = Callable[[Tensor], Tensor]
"""From positions, int64 [R, Q], to bool [R, Q, Q]: which of the keys that its pattern lets it see
a query attends to so far."""
Origin = Literal["text", "completion"]
"""Where blocks are counted from. From the text's beginning, a block may have the end of the prompt
and the first tokens of the completion, and the last block is sampled whole and cut. From the
completion's, the prompt's first block may be short, and the completion's last."""


@dataclass(frozen=True)
class Blocks:
    """The blocks of a block-causal model."""

    length: int
    origin: Origin = "text"
    whole_last: bool = True
    """Of blocks counted from the text, the last is sampled whole and cut."""
    causal_context: bool = False
    """Clean tokens attend from left to right, and only noised ones to the whole of their block. The
    first token of a block is then predicted by the clean token before it, whatever the shift."""
    first_alone: bool = False
    """The first token of a block is decided before its others, in the pass over the one before."""

    @property
    def cut(self) -> bool:
        """Whether the last block is sampled whole, and what is beyond the completion cut."""
        return self.origin == "text" and self.whole_last

    def of(self, positions: Tensor, starts: Tensor) -> Tensor:
        """The number of the block that each position is in.

        Args:
            positions: int64 [R, T], counted from the beginning of the text.
            starts: int64 [R], the lengths of the prompts.

        Returns:
            int64 [R, T]; with origin `completion` below 0 in the prompt.
        """
        if self.origin == "completion":
            positions = positions - starts[:, None]
        return positions.div(self.length, rounding_mode="floor")

    def first(self, start: int) -> int:
        """Where the first block of a completion begins, whose prompt has `start` tokens."""
        return start - start % self.length if self.origin == "text" else start

    def whole(self, lengths: Lengths) -> Lengths:
        """Lengths of texts, a number or int64 [R], whose last block is sampled whole."""
        return -(-lengths // self.length) * self.length if self.cut else lengths

    def attends(
        self,
        queries: Tensor,
        keys: Tensor,
        query_noised: Tensor,
        key_noised: Tensor,
        starts: Tensor,
    ) -> Tensor:
        """The attention mask: bool [R, Q, K], true where a query attends to a key.

        Args:
            queries, keys: int64 [R, Q] and [R, K], positions in the text.
            query_noised, key_noised: bool [R, Q] and [R, K], tokens of a noised copy.
            starts: int64 [R], the lengths of the prompts.
        """
        q, k = self.of(queries, starts)[:, :, None], self.of(keys, starts)[:, None]
        from_noise, to_noise = query_noised[:, :, None], key_noised[:, None]
        clean = keys[:, None] <= queries[:, :, None] if self.causal_context else k <= q
        return torch.where(to_noise, from_noise & (k == q), torch.where(from_noise, k < q, clean))

    def reach(self, shift: int) -> int:
        """How far before a block a pass over it begins, to have the logits of its first token."""
        return 1 if self.causal_context and not self.first_alone else shift

    def leads(self, positions: Tensor, starts: Tensor, shift: int) -> Tensor | None:
        """bool [R, T]: tokens whose logits are those of the clean token before; None: none."""
        if not shift and not self.causal_context:
            return None
        before = (positions - 1).clamp(min=0)
        return self.of(positions, starts) > self.of(before, starts)


def windowed_layers(config: Any) -> int:
    """How many layers of a decoder attend within a sliding window only."""
    every = ["sliding_attention"] * config.num_hidden_layers
    kinds: list[str] = getattr(config, "layer_types", None) or every
    return kinds.count("sliding_attention") if getattr(config, "sliding_window", None) else 0


def layer_masks(config: Any, allowed: Tensor, positions: Tensor) -> Any:
    """What a decoder of transformers takes as `attention_mask`, its sliding windows kept.

    It uses a mask of four dimensions as it is, for layers with a sliding window too. So these get
    their own: no further than the window to either side, as `is_causal = False` has it.

    Args:
        config: of the decoder.
        allowed: bool [B, T, T].
        positions: int64 [B, T].

    Returns:
        bool [B, 1, T, T], or such a mask for each kind of layer.
    """
    everywhere = allowed[:, None]
    if not windowed_layers(config):
        return everywhere
    near = (positions[:, :, None] - positions[:, None]).abs() <= config.sliding_window
    within = (allowed & near)[:, None]
    if getattr(config, "layer_types", None) is None:
        return within
    return {"full_attention": everywhere, "sliding_attention": within}


def additive(mask: Any, dtype: torch.dtype) -> Any:
    """Masks of four dimensions as transformers' eager attention takes them: added to the scores.

    Args:
        mask: what `layer_masks` returns, or an attention mask of two dimensions, which stays.
    """
    if isinstance(mask, dict):
        return {kind: additive(of_kind, dtype) for kind, of_kind in mask.items()}
    if mask is None or mask.dim() != 4:
        return mask
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask.bool(), lowest)


class NoisedRows(NamedTuple):
    """Noised texts as a model reads them: alone, or block-causally after the clean text."""

    ids: Tensor
    """int64 [R, Q]."""
    attention: Tensor | None
    """bool [R, Q], false for padding; None without padding."""
    positions: Tensor | None
    """int64 [R, Q], the position in the text; None: counted from 0."""
    allowed: Tensor | None
    """bool [R, Q, Q]; None: as the model's class attends."""
    offsets: Tensor
    """int64 [R]: position p of the noised text is at column p + offset."""
    leads: Tensor | None
    """bool [R, T], positions whose logits are those of the clean token before them; None: none."""

    def noised(self, outputs: Tensor) -> Tensor:
        """Of outputs [R, Q, H] of all tokens, those of the noised texts: [R, T, H].

        The whole text must have been copied.
        """
        if self.positions is None:
            return outputs
        width = self.positions.shape[1] // 2
        return outputs[:, width:]

    def to(self, device: torch.device) -> NoisedRows:
        """The rows on a device."""
        parts = {name: part for name, part in self._asdict().items() if part is not None}
        return self._replace(**{name: sent(part, device) for name, part in parts.items()})

    def columns(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Where the noised tokens at (rows, positions), int64 [N] each, stand: int64 [N]."""
        return positions + self.offsets[rows]

    def sources(self, rows: Tensor, positions: Tensor, shift: int) -> Tensor:
        """Where the logits of these tokens stand: int64 [N].

        With a shift of 1 the logits of a block's first token belong to the last of the block
        before, which is clean.
        """
        columns = (positions - shift).clamp(min=0) + self.offsets[rows]
        if self.leads is None:
            return columns
        return (positions - 1).where(self.leads[rows, positions], columns)


def plain_rows(ids: Tensor, attention: Tensor | None) -> NoisedRows:
    """Rows of a model that reads a noised text alone; arguments as `Policy.hidden` takes them."""
    return NoisedRows(ids, attention, None, None, torch.zeros_like(ids[:, 0]), None)


def noised_rows(
    blocks: Blocks | None,
    shift: int,
    clean: Tensor,
    noised: Tensor,
    wanted: Tensor,
    starts: Tensor,
    lengths: Tensor,
) -> NoisedRows:
    """The rows of a pass that is to predict or read the wanted tokens of a noised text.

    Args:
        blocks: None for a model that is not block-causal, which reads the noised text alone.
        clean, noised: int64 [R, T], the text before and after noise; padding on the right.
        wanted: bool [R, T]. Only the blocks from the first such token to the last are copied.
        starts, lengths: int64 [R], of the prompts and of the whole texts.
    """
    (rows, width), device = clean.shape, clean.device
    columns = torch.arange(width, device=device).expand(rows, -1)  # [R, T]
    there = columns < lengths[:, None]  # [R, T]
    if blocks is None:
        padded = bool((lengths < width).any())
        return plain_rows(noised, there if padded else None)
    # 1. The noised copy of row r has the positions firsts[r] to ends[r], in whole blocks.
    numbers = blocks.of(columns, starts)  # [R, T]
    any_wanted = wanted.any(dim=1, keepdim=True)
    lowest = numbers.where(wanted, numbers.max()).amin(dim=1, keepdim=True)
    highest = numbers.where(wanted, numbers.min()).amax(dim=1, keepdim=True)
    copied = (lowest <= numbers) & (numbers <= highest) & there & any_wanted  # [R, T]
    firsts = copied.long().argmax(dim=1)  # [R]
    ends = firsts + copied.sum(dim=1)  # [R]
    # 2. Rows with shorter copies are padded with their last token, which has a block to attend to.
    copy_width = int((ends - firsts).max())  # C
    offset = torch.arange(copy_width, device=device)
    places = firsts[:, None] + offset  # [R, C]
    copy_there = places < ends[:, None]
    places = places.minimum((ends[:, None] - 1).clamp(min=0))
    # 3. Put both together: Q = T + C.
    positions = torch.cat([columns, places], dim=1)  # [R, Q]
    attention = torch.cat([there, copy_there], dim=1)
    is_copy = torch.zeros_like(attention)
    is_copy[:, width:] = True
    allowed = blocks.attends(positions, positions, is_copy, is_copy, starts) & attention[:, None]
    return NoisedRows(
        torch.cat([clean, noised.gather(1, places)], dim=1),
        attention,
        positions,
        allowed,
        width - firsts,
        blocks.leads(columns, starts, shift),
    )
