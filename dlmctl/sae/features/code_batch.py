"""Codes of a masked corpus under an autoencoder, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.models.blocks import block_outputs
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.sae.chunks import encoded
from dlmctl.sae.corpus import MaskedBatch
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.corpus import Positions


class CodeBatch(NamedTuple):
    """A batch and the features that are active on its tokens, on the CPU.

    N tokens of the batch are encoded, in the order of its rows. A slot is the place of a feature
    among the S asked for. P pairs of a token and a slot are active, sorted by token, then by slot.
    """

    batch: MaskedBatch
    size: int
    """S."""
    numbers: Tensor
    """int64 [B], the documents."""
    index: Tensor
    """int64 [B, T], a token's number among the N; -1 for the others."""
    row: Tensor
    """int64 [N], the row of each token."""
    column: Tensor
    """int64 [N], its place in the row."""
    slots: Tensor
    """int64 [N, K], active slots; S in place of those that are not active."""
    token: Tensor
    """int64 [P]."""
    slot: Tensor
    """int64 [P]."""
    value: Tensor
    """float32 [P], activations above 0."""

    def activations(self, slot: Tensor, token: Tensor) -> Tensor:
        """Activations of slots on tokens, whose shapes broadcast; 0 for token -1."""
        wanted = token * self.size + slot
        if not len(self.value):
            return torch.zeros(wanted.shape)
        keys = self.token * self.size + self.slot  # [P], sorted
        place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=len(keys) - 1)
        active = (keys[place] == wanted) & (token >= 0)
        return self.value[place].where(active, torch.tensor(0.0))


def code_batches(
    batches: Iterable[MaskedBatch],
    policy: Policy,
    layer: int,
    sae: TopKSae,
    positions: Positions,
    latents: Tensor,
) -> Iterator[CodeBatch]:
    """The codes of tokens of a kind, of the features `latents`, int64 [S].

    Raises:
        UsageError: the autoencoder is for activations of another width.
    """
    size = len(latents)
    slot_of = torch.full((sae.d_sae,), size)
    slot_of[latents] = torch.arange(size)
    sae = sae.to(policy.device)
    for batch in batches:
        if positions == "clean":
            batch = batch.clean()
        chosen = batch.selected(positions)
        with torch.no_grad():
            output = block_outputs(policy, batch.rows(policy), [layer])[layer]
            if output.shape[-1] != sae.d_in:
                raise UsageError(
                    f"the autoencoder is for activations of width {sae.d_in}, and those of "
                    f"{policy.name} have {output.shape[-1]}: give the --model it is for"
                )
            x = output[chosen].to(sae.W_enc.dtype)  # [N, d]
            codes = encoded(sae, x)
        values = codes.values.float().cpu()  # [N, K]
        slots = slot_of[codes.indices.cpu()]
        slots, order = slots.where(values > 0, size).sort(dim=1)
        token, place = (slots < size).nonzero(as_tuple=True)  # [P]
        chosen = chosen.cpu()
        row, column = chosen.nonzero(as_tuple=True)
        index = torch.full(chosen.shape, -1)
        index[chosen] = torch.arange(len(slots))
        on_cpu = {name: getattr(batch, name).cpu() for name in MaskedBatch._fields[1:]}
        yield CodeBatch(
            batch._replace(**on_cpu),
            size,
            torch.tensor([document.number for document in batch.documents]),
            index,
            row,
            column,
            slots,
            token,
            slots[token, place],
            values.gather(1, order)[token, place],
        )
