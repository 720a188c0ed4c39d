"""Whether the autoencoders of a model still fit it after more training (DLM-Scope, section 5).

The base model and the tuned one see the same tokens under the same masks. Compared are how well the
activations of each are reconstructed, the loss on insertion in each, and how similar the codes are:

    jaccard      |A n B| / |A u B|, the share of a token's active latents that both codes have
    code_cosine  cosine of the codes

With autoencoders trained on the tuned model, `matched` is the mean over latents of the largest
cosine of their decoder row with a row of the other, and `matched_above` the share above 0.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.models.float32_products import whole_products
from dlmctl.models.policy import Policy, check_same_tokens
from dlmctl.records.errors import UsageError
from dlmctl.sae.corpus import MaskedBatch
from dlmctl.sae.evaluation.evaluate import Evaluation, PlacedSae
from dlmctl.sae.topk import Codes
from dlmctl.settings.sae import Insertion

MATCH = 0.9
"""Cosine above which two latents count as the same."""
ROWS = 1024
"""Latents that are compared with all others at once."""


class CodeSimilarity:
    """Similarity of pairs of codes, summed over tokens."""

    def __init__(self) -> None:
        self._tokens = 0
        self._jaccard = self._cosine = 0.0

    def add(self, first: Codes, second: Codes) -> None:
        """Codes of the same tokens."""
        shared, either, cosine = compare(first, second)
        self._tokens += len(shared)
        self._jaccard += float((shared / either.clamp(min=1)).sum())
        self._cosine += float(cosine.sum())

    def row(self) -> dict[str, float]:
        """The means."""
        count = max(1, self._tokens)
        return {"jaccard": self._jaccard / count, "code_cosine": self._cosine / count}


def compare(first: Codes, second: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the codes of the same N tokens.

    Returns:
        float64 [N] each: number of latents active in both codes, in either, cosine. Two codes
        without an active latent count as equal.
    """
    values = torch.cat([first.values, second.values], dim=1).double()  # [N, 2K]
    indices = torch.cat([first.indices, second.indices], dim=1).where(values > 0, -1)
    indices, order = indices.sort(dim=1)
    values = values.gather(1, order)
    # A latent is in each code at most once, so after sorting only neighbours can be equal.
    both = (indices[:, 1:] == indices[:, :-1]) * values[:, 1:] * values[:, :-1]  # [N, 2K - 1]
    shared = (both > 0).sum(dim=1).double()
    either = (values > 0).sum(dim=1) - shared
    size = first.values.double().norm(dim=1) * second.values.double().norm(dim=1)
    cosine = (both.sum(dim=1) / size.clamp(min=1e-30)).where(either > 0, 1.0)
    return shared.where(either > 0, 1.0), either, cosine


def match_decoders(first: Tensor, second: Tensor) -> dict[str, float]:
    """How well rows [F, d] have a counterpart among rows [G, d]."""
    first, second = functional.normalize(first), functional.normalize(second)
    with whole_products():
        best = torch.cat([(part @ second.T).amax(dim=1) for part in first.split(ROWS)])
    return {"matched": float(best.mean()), "matched_above": float((best > MATCH).double().mean())}


def stability(
    base: Policy,
    tuned: Policy,
    batches: Iterable[MaskedBatch],
    saes: Sequence[PlacedSae],
    insertion: Insertion,
    corpus: Mapping[str, Any],
    tuned_saes: Sequence[PlacedSae] = (),
) -> list[dict[str, Any]]:
    """A record for each autoencoder; the measures on each model have `base_` or `tuned_` in front.

    Args:
        corpus: what each record says about the corpus.
        tuned_saes: autoencoders of the tuned model, matched by layer, K and positions.

    Raises:
        DataError: the corpus has no token of the kind that an autoencoder is for.
        UsageError: the models have different tokenizers.
    """
    if base.mask_id != tuned.mask_id:
        raise UsageError(f"{base.name} and {tuned.name} have different mask tokens")
    sides = {name: Evaluation(p, saes, insertion) for name, p in (("base", base), ("tuned", tuned))}
    similarities = [CodeSimilarity() for _ in saes]
    for batch in batches:
        check_same_tokens(base, tuned, batch.masked_ids.unique().tolist())
        pairs = zip(*(side.add(batch) for side in sides.values()), strict=True)
        for similarity, (first, second) in zip(similarities, pairs, strict=True):
            similarity.add(first, second)
    rows = []
    for number, placed in enumerate(saes):
        row = {**placed.about, "model": base.name, "tuned": tuned.name, **corpus}
        row |= similarities[number].row()
        for name, side in sides.items():
            row |= {f"{name}_{key}": value for key, value in side.row(number).items()}
        for other in tuned_saes:
            if other.about | {"sae": placed.name} == placed.about:
                row |= match_decoders(placed.sae.W_dec.detach(), other.sae.W_dec.detach())
        rows.append(row)
    return rows
