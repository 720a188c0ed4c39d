"""The loss of a model while an autoencoder stands in for the output of one of its blocks.

Negative log-likelihood per token in nats: of masked tokens (`mask`), of visible tokens after the
prompt (`unmask`), and the bound on that of the text, `nelbo` = sum (1/t) CE of masked tokens /
tokens that may be masked. The logits of a token are taken at the position that the model's family
defines; the published script takes them at the token itself, which for Dream are the next token's.

`mask_per_t` is the mean over masked tokens of CE / t, and `unmask_per_t` the mean over visible
tokens of CE / (1 - t), the published definitions (DLM-Scope, arXiv 2602.05859, section 3.2).
"""

from __future__ import annotations

import contextlib
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.fused_linear_logprob import target_log_probs
from dlmctl.models.attention import NoisedRows
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.sae.corpus import MaskedBatch, Positions
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.sae import Scope


def splice(policy: Policy, sae: TopKSae, positions: Positions, scope: Scope) -> Edit:
    """The edit that replaces x by decode(encode(x)), without an error term."""

    def replace(output: Tensor, ids: Tensor) -> Tensor:
        wanted = torch.ones_like(ids, dtype=torch.bool)
        if scope == "matching" and positions in ("mask", "unmask"):
            wanted = (ids == policy.mask_id) == (positions == "mask")
        reconstruction = sae(output[wanted].to(sae.W_enc.dtype)).to(output.dtype)  # [N, d]
        return output.index_put((wanted,), reconstruction)

    return replace


LOSSES = ("mask", "unmask", "nelbo", "mask_per_t", "unmask_per_t")


class DocumentLosses(NamedTuple):
    """Losses of the B documents of a batch, each a sum over tokens and their number."""

    sums: Tensor
    """float64 [5, B], nats, in the order of `LOSSES`."""
    tokens: Tensor
    """float64 [5, B]."""


@torch.no_grad()
def document_losses(
    policy: Policy, batch: MaskedBatch, edits: dict[int, Edit] | None = None
) -> DocumentLosses:
    """The losses of a batch by document, in a forward pass with these blocks edited."""
    rows = batch.rows(policy)
    with edited_blocks(policy, edits) if edits else contextlib.nullcontext():
        states = policy.hidden_of(rows)
    level = batch.level.cpu()
    masked, masked_tokens = _by_document(policy, batch, rows, states, "mask")
    visible, visible_tokens = _by_document(policy, batch, rows, states, "unmask")
    masked_per_t = masked / level.clamp(min=1e-6)
    visible_per_t = visible / (1 - level).clamp(min=1e-6)
    maskable = torch.tensor([len(d.ids) - d.kept for d in batch.documents]) * (level > 0)
    sums = (masked, visible, masked_per_t, masked_per_t, visible_per_t)
    tokens = (masked_tokens, visible_tokens, maskable.double(), masked_tokens, visible_tokens)
    return DocumentLosses(torch.stack(sums), torch.stack(tokens))


def _by_document(
    policy: Policy,
    batch: MaskedBatch,
    rows: NoisedRows,
    states: Tensor,
    kind: Literal["mask", "unmask"],
) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over each document's tokens of a kind, and their number; [B] each.

    Tokens of a prompt that is never masked do not count: the model was not trained on them.
    """
    kept = torch.tensor([document.kept for document in batch.documents], device=batch.ids.device)
    column = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    wanted = batch.selected(kind) & (column >= kept[:, None])  # [B, T]
    row, position = wanted.nonzero(as_tuple=True)
    chosen = states[row, rows.sources(row, position, policy.shift)]  # [N, H]
    loss = -target_log_probs(policy, chosen, batch.ids[row, position])
    # Summed on the CPU: an index_add of CUDA has no fixed order.
    row, nothing = row.cpu(), torch.zeros(len(batch.documents), dtype=torch.float64)
    sums = nothing.index_add(0, row, loss.double().cpu())
    return sums, torch.bincount(row, minlength=len(nothing)).double()


class Losses:
    """Losses per token over many documents."""

    def __init__(self) -> None:
        self._sums, self._tokens = torch.zeros(2, len(LOSSES), dtype=torch.float64)

    def add(self, found: DocumentLosses) -> None:
        """Take in documents."""
        self._sums += found.sums.sum(dim=1)
        self._tokens += found.tokens.sum(dim=1)

    def means(self) -> dict[str, float | None]:
        """Each loss per token; None if there was no token of its kind."""
        rows = zip(LOSSES, self._sums.tolist(), self._tokens.tolist(), strict=True)
        return {name: value / tokens if tokens else None for name, value, tokens in rows}


class Changes:
    """Change of each loss per token from before to after, on the same documents.

    The change is a ratio of sums over documents i, R = sum d_i / sum n_i, where d_i is the change
    of the document's summed loss and n_i the number of its tokens. Its standard error treats the
    documents as independent (Cochran, Sampling Techniques, on ratio estimators):

        se^2 = D / (D - 1) * sum (d_i - R n_i)^2 / (sum n_i)^2,  D documents with n_i > 0

    Tokens of one document share their context and mask, so that an error over tokens would be too
    small.
    """

    def __init__(self) -> None:
        self._moments = torch.zeros(6, len(LOSSES), dtype=torch.float64)
        """Sums over documents of d, n, d^2, d n, n^2 and of one."""

    def add(self, before: DocumentLosses, after: DocumentLosses) -> None:
        """Losses of the same documents."""
        d, n = after.sums - before.sums, before.tokens
        parts = torch.stack([d, n, d * d, d * n, n * n, (n > 0).double()])  # [6, 5, B]
        self._moments += parts.sum(dim=2)

    def row(self) -> dict[str, float | None]:
        """`delta_NAME`, negative if the loss falls, and `delta_NAME_se` for each loss.

        None if there was no token; the standard error also if there was one document alone.
        """
        row: dict[str, float | None] = {}
        for name, moments in zip(LOSSES, self._moments.T.tolist(), strict=True):
            d, n, dd, dn, nn, documents = moments
            change = d / n if n else None
            row[f"delta_{name}"] = change
            row[f"delta_{name}_se"] = None
            if change is not None and documents > 1:
                residual = max(0.0, dd - 2 * change * dn + change * change * nn)
                error = math.sqrt(residual * documents / (documents - 1)) / n
                row[f"delta_{name}_se"] = error
        return row
