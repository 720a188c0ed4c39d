"""Which features are active on the tokens of a corpus, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.models.blocks import block_outputs
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.sae.corpus import MaskedBatch, Positions
from dlmctl.sae.topk import TopKSae

CHUNK = 4096
"""Tokens that are encoded at once: N x F numbers."""


class Active(NamedTuple):
    """A batch and its codes, on the CPU.

    Of N tokens looked at, in the order of the rows, P pairs of a token and a feature are active,
    sorted by token and then by slot. A slot is the place of a feature among the S asked for.
    """

    batch: MaskedBatch
    size: int
    """S."""
    numbers: Tensor
    """int64 [B], the documents."""
    index: Tensor
    """int64 [B, T], a token's number among those looked at; -1 for the others."""
    row: Tensor
    """int64 [N], its row."""
    column: Tensor
    """int64 [N], its place in the row."""
    slots: Tensor
    """int64 [N, K], active features; S in place of those that are not."""
    token: Tensor
    """int64 [P]."""
    slot: Tensor
    """int64 [P]."""
    value: Tensor
    """float32 [P], above 0."""

    def at(self, slot: Tensor, token: Tensor) -> Tensor:
        """Activations of slots on tokens, which broadcast; 0 for token -1."""
        wanted = token * self.size + slot
        if not len(self.value):
            return torch.zeros(wanted.shape)
        keys = self.token * self.size + self.slot
        place = torch.searchsorted(keys, wanted.contiguous()).clamp(max=len(keys) - 1)
        return self.value[place].where((keys[place] == wanted) & (token >= 0), torch.tensor(0.0))


def active_features(
    batches: Iterable[MaskedBatch],
    policy: Policy,
    layer: int,
    sae: TopKSae,
    positions: Positions,
    latents: Tensor,
) -> Iterator[Active]:
    """What is active on the tokens of a kind, among the features `latents`, int64 [S].

    Raises:
        UsageError: the autoencoder is made for activations of another width.
    """
    slot_of = torch.full((sae.d_sae,), len(latents))
    slot_of[latents] = torch.arange(len(latents))
    sae = sae.to(policy.device)
    for batch in batches:
        if positions == "clean":
            batch = batch.clean()
        chosen = batch.selected(positions)
        with torch.no_grad():
            output = block_outputs(policy, batch.masked_ids, batch.attention, [layer])[layer]
            if output.shape[-1] != sae.d_in:
                raise UsageError(
                    f"the autoencoder is for activations of width {sae.d_in}, and those of "
                    f"{policy.name} have {output.shape[-1]}: give the --model it is for"
                )
            x = output[chosen].to(sae.W_enc.dtype)
            codes = [sae.encode(part) for part in x.split(CHUNK)]
        values = torch.cat([part.values for part in codes]).float().cpu()
        slots = slot_of[torch.cat([part.indices for part in codes]).cpu()]
        yield _sorted(batch, chosen.cpu(), values, slots.where(values > 0, len(latents)), latents)


def _sorted(
    batch: MaskedBatch, chosen: Tensor, values: Tensor, slots: Tensor, latents: Tensor
) -> Active:
    on_cpu = {name: getattr(batch, name).cpu() for name in MaskedBatch._fields[1:]}
    row, column = chosen.nonzero(as_tuple=True)
    numbers = torch.tensor([document.number for document in batch.documents])
    slots, order = slots.sort(dim=1)
    token, place = (slots < len(latents)).nonzero(as_tuple=True)
    index = torch.full(chosen.shape, -1)
    index[chosen] = torch.arange(len(slots))
    return Active(
        batch._replace(**on_cpu),
        len(latents),
        numbers,
        index,
        row,
        column,
        slots,
        token,
        slots[token, place],
        values.gather(1, order)[token, place],
    )
