"""The loss of a model while an autoencoder stands in for the output of one of its blocks.

Negative log-likelihood per token in nats, of hidden tokens (`mask`), of visible ones (`unmask`),
and the bound on that of the text, `nelbo` = sum (1/t) CE of hidden tokens / tokens that may be
hidden. The logits of a token are taken where its family has them; the published script takes them
at the token itself, which for Dream are those of the next one.

`mask_per_t` is the mean over hidden tokens of CE / t and `unmask_per_t` that over visible ones of
CE / (1 - t), the published definitions (DLM-Scope, arXiv 2602.05859, section 3.2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from dlmctl.diffusion.projection import target_log_probs
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.sae.corpus import Batch, Positions
from dlmctl.sae.topk import TopKSae

Scope = Literal["all", "matching"]
"""Positions at which the autoencoder stands in: all, or those it was trained on."""


def splice(policy: Policy, sae: TopKSae, positions: Positions, scope: Scope) -> Edit:
    """The edit that puts decode(encode(x)) in the place of x, without an error term."""

    def put(output: Tensor, ids: Tensor) -> Tensor:
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if scope == "matching" and positions in ("mask", "unmask"):
            wanted = (ids == policy.mask_id) == (positions == "mask")
        made = sae(output[wanted].to(sae.W_enc.dtype)).to(output.dtype)
        return output.index_put((wanted,), made)

    return put


class Losses:
    """Sums of the losses over batches."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("mask", "unmask", "nelbo", "mask_per_t", "unmask_per_t"), 0.0)
        self._counts = dict.fromkeys(("mask", "unmask", "nelbo"), 0)

    @torch.no_grad()
    def add(self, policy: Policy, batch: Batch, sae_edits: dict[int, Edit] | None = None) -> None:
        """A pass over a batch, with these blocks edited."""
        with edited_blocks(policy, sae_edits) if sae_edits else contextlib.nullcontext():
            states = policy.hidden(batch.seen, batch.attention)
        for kind, weight in self._weights(batch):
            row, position = batch.selected(kind).nonzero(as_tuple=True)
            chosen = states[row, policy.source(position)]
            loss = -target_log_probs(policy, chosen, batch.ids[row, position]).double()
            self._sums[kind] += float(loss.sum())
            self._counts[kind] += len(row)
            weighted = float((loss * weight[row].to(loss.device)).sum())
            self._sums[f"{kind}_per_t"] += weighted
            if kind == "mask":
                self._sums["nelbo"] += weighted
        self._counts["nelbo"] += sum(
            len(document.ids) - document.kept for document in batch.documents
        )

    def _weights(self, batch: Batch) -> Iterator[tuple[Literal["mask", "unmask"], Tensor]]:
        yield "mask", 1 / batch.level.clamp(min=1e-6)
        yield "unmask", 1 / (1 - batch.level).clamp(min=1e-6)

    def means(self) -> dict[str, float | None]:
        """Each loss per token; None where there was no token of its kind."""
        counts = {
            **self._counts,
            "mask_per_t": self._counts["mask"],
            "unmask_per_t": self._counts["unmask"],
        }
        if not self._counts["mask"]:
            counts["nelbo"] = 0
        return {n: s / counts[n] if counts[n] else None for n, s in self._sums.items()}


def differences(spliced: Losses, clean: Losses) -> dict[str, float | None]:
    """Spliced minus clean, `delta_mask` and so on; negative where the autoencoder helps."""
    after, before = spliced.means(), clean.means()
    return {
        f"delta_{name}": None if value is None else value - (before[name] or 0.0)
        for name, value in after.items()
    }
