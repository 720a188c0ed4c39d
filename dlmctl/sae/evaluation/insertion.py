"""The loss of a model while something stands in for the output of one of its blocks.

Negative log-likelihood per token in nats: of masked tokens (`mask`), of visible tokens after the
prompt (`unmask`), and the bound on that of the text, `nelbo` = sum (1/t) CE of masked tokens /
tokens that may be masked. The logits of a token are taken at the position that the model's family
defines; the published script takes them at the token itself, which for Dream are the next token's.

`mask_per_t` is the mean over masked tokens of CE / t, and `unmask_per_t` the mean over visible
tokens of CE / (1 - t), the published definitions (DLM-Scope, arXiv 2602.05859, section 3.2).

`divergences` is KL(p || q) at the tokens that the model was trained to predict, from what it
predicts as it is, p, to what it predicts with the insertion, q.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.fused_linear_logprob import divergence, target_log_probs
from dlmctl.diffusion.noise import key_tensor, stream_key, subkeys
from dlmctl.models.attention import NoisedRows
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.float32_products import whole_products
from dlmctl.models.policy import Policy
from dlmctl.sae.corpus import MaskedBatch
from dlmctl.sae.ratios import Ratios

Replacement = Callable[[Tensor, Tensor], Tensor]
"""From activations [N, d] and a random key for each token, int64 [N], to what stands in, [N, d]."""
Where = Literal["mask", "unmask", "all"]
"""Tokens that the model sees masked, or not, or all of them."""
Scored = Literal["mask", "unmask"]
LOSSES = ("mask", "unmask", "nelbo", "mask_per_t", "unmask_per_t")


class Seen(NamedTuple):
    """A batch as the blocks of a model see it, R rows of Q tokens."""

    batch: MaskedBatch
    rows: NoisedRows
    masked: Tensor
    """bool [R, Q]."""
    there: Tensor
    """bool [R, Q], false for padding."""
    first: Tensor
    """bool [R, Q], the first token of each text."""
    keys: Tensor
    """int64 [R, Q], a random key for each token, which does not depend on its batch."""

    def spliced(self, where: Where, keep_first: bool) -> Tensor:
        """bool [R, Q], the tokens at which something stands in."""
        wanted = self.there & ~self.first if keep_first else self.there
        return wanted if where == "all" else wanted & (self.masked == (where == "mask"))


def seen(policy: Policy, batch: MaskedBatch, seed: int = 0) -> Seen:
    """A batch as the blocks see it; the random keys depend on the seed."""
    rows = batch.rows(policy)
    width = batch.ids.shape[1]
    columns = torch.arange(rows.ids.shape[1], device=rows.ids.device).expand_as(rows.ids)
    positions = columns if rows.positions is None else rows.positions
    masked = rows.ids == -1 if policy.mask_id is None else rows.ids == policy.mask_id
    documents = [stream_key(seed, "insertion", document.number) for document in batch.documents]
    # A block-causal model sees each token twice: in the clean text, and in the noised copy.
    places = 2 * positions + (columns >= width).long()
    keys = subkeys(key_tensor(documents, rows.ids.device)[:, None], places)
    there = torch.ones_like(masked) if rows.attention is None else rows.attention
    return Seen(batch, rows, masked, there, positions == 0, keys)


def splice(wanted: Tensor, keys: Tensor, replacement: Replacement) -> Edit:
    """The edit that replaces activations, without an error term.

    Args:
        wanted: bool [R, Q], of which tokens.
        keys: int64 [R, Q].
    """

    def edit(output: Tensor, _: Tensor) -> Tensor:
        made = replacement(output[wanted], keys[wanted])
        return output.index_put((wanted,), made.to(output.dtype))

    return edit


class DocumentLosses(NamedTuple):
    """Losses of the B documents of a batch, each a sum over tokens and their number."""

    sums: Tensor
    """float64 [5, B], nats, in the order of `LOSSES`."""
    tokens: Tensor
    """float64 [5, B]."""


class Prediction(NamedTuple):
    """What a pass predicts."""

    losses: DocumentLosses
    states: Tensor
    """[N, H], the hidden states that predict the scored tokens."""
    row: Tensor
    """int64 [N], the document of each, on the CPU."""


@torch.no_grad()
def predicted(
    policy: Policy, view: Seen, scored: Scored, edits: Mapping[int, Edit] | None = None
) -> Prediction:
    """What a forward pass predicts with these blocks edited."""
    batch = view.batch
    with edited_blocks(policy, edits) if edits else contextlib.nullcontext():
        states = policy.hidden_of(view.rows)
    level = batch.level.cpu()
    found = {kind: _by_document(policy, view, states, kind) for kind in ("mask", "unmask")}
    masked, masked_tokens = found["mask"][:2]
    visible, visible_tokens = found["unmask"][:2]
    masked_per_t = masked / level.clamp(min=1e-6)
    visible_per_t = visible / (1 - level).clamp(min=1e-6)
    maskable = torch.tensor([len(d.ids) - d.kept for d in batch.documents]) * (level > 0)
    sums = (masked, visible, masked_per_t, masked_per_t, visible_per_t)
    tokens = (masked_tokens, visible_tokens, maskable.double(), masked_tokens, visible_tokens)
    return Prediction(DocumentLosses(torch.stack(sums), torch.stack(tokens)), *found[scored][2:])


def _by_document(
    policy: Policy, view: Seen, states: Tensor, kind: Scored
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy summed over each document's tokens of a kind, and their number; [B] each.

    Also the states [N, H] that predict the tokens, and their documents [N]. Tokens of a prompt that
    is never masked do not count: the model was not trained on them.
    """
    batch = view.batch
    kept = torch.tensor([document.kept for document in batch.documents], device=batch.ids.device)
    column = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    wanted = batch.selected(kind) & (column >= kept[:, None])  # [B, T]
    row, position = wanted.nonzero(as_tuple=True)
    chosen = states[row, view.rows.sources(row, position, policy.shift)]  # [N, H]
    loss = -target_log_probs(policy, chosen, batch.ids[row, position])
    row = row.cpu()
    sums, tokens = by_document(loss, row, len(batch.documents))
    return sums, tokens, chosen, row


def by_document(values: Tensor, row: Tensor, documents: int) -> tuple[Tensor, Tensor]:
    """Sums of values [N] over the tokens of each document, and their number, float64 [B] each.

    On the CPU: an index_add of CUDA has no fixed order.

    Args:
        row: int64 [N], the document of each, on the CPU.
    """
    sums = torch.zeros(documents, dtype=torch.float64).index_add(0, row, values.double().cpu())
    return sums, torch.bincount(row, minlength=documents).double()


@torch.no_grad()
def divergences(policy: Policy, first: Prediction, second: Prediction) -> Tensor:
    """KL of the predicted distributions, float64 [B], a sum over each document's scored tokens."""
    with whole_products():  # close distributions differ by little more than rounding
        found = divergence(policy, first.states, second.states)
    return by_document(found, first.row, first.losses.tokens.shape[1])[0]


class Losses(Ratios):
    """Losses per token over many documents, each as `loss_NAME`."""

    def __init__(self) -> None:
        super().__init__([f"loss_{name}" for name in LOSSES])

    def add_pass(self, found: DocumentLosses) -> None:
        """Take in documents."""
        self.add(found.sums, found.tokens)


class Changes(Ratios):
    """Change of each loss per token on the same documents, `delta_NAME`, negative if it falls."""

    def __init__(self) -> None:
        super().__init__([f"delta_{name}" for name in LOSSES])

    def add_pair(self, before: DocumentLosses, after: DocumentLosses) -> None:
        """Take in losses of the same documents."""
        self.add(after.sums - before.sums, before.tokens)


ABLATIONS = {"zero": "", "mean": "_mean"}
"""What their names end with: those of zero ablation are SAEBench's."""


class Recovered(Ratios):
    """What of a model's predictions is left, compared with ablation.

    kl_div_with_sae        KL from the model as it is to the model with the insertion
    ce_loss_with_ablation  loss while zeros stand in
    ce_loss_score          (loss with zeros - loss with the insertion) / (loss with zeros - loss)
    kl_div_with_ablation   KL from the model as it is to the model with zeros
    kl_div_score           1 - kl_div_with_sae / kl_div_with_ablation

    With `_mean` behind it the mean activation stands in, not zeros.
    """

    def __init__(self, ablate: bool) -> None:
        parts = ("ce_loss_with_ablation", "ce_loss_score", "kl_div_with_ablation", "kl_div_score")
        endings = ABLATIONS.values() if ablate else ()
        super().__init__(
            ["kl_div_with_sae", *(part + ending for ending in endings for part in parts)]
        )

    def add_documents(
        self,
        losses: tuple[Tensor, Tensor],
        divergence: Tensor,
        tokens: Tensor,
        ablated: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        """Take in documents, float64 [B] each.

        Args:
            losses: summed over scored tokens, without and with the insertion.
            divergence: summed over the same tokens.
            tokens: their number.
            ablated: loss and divergence under each ablation.
        """
        before, after = losses
        pairs = [(divergence, tokens)]
        for name in ABLATIONS if ablated else ():
            loss, far = ablated[name]
            pairs += [(loss, tokens), (loss - after, loss - before)]
            pairs += [(far, tokens), (far - divergence, far)]
        tops, bottoms = zip(*pairs, strict=True)
        self.add(torch.stack(tops), torch.stack(bottoms))
