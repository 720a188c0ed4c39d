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
from dlmctl.sae.evaluation.controls import sampled
from dlmctl.sae.evaluation.evaluate import (
    Coded,
    Evaluation,
    about_insertion,
    about_weights,
)
from dlmctl.sae.evaluation.insertion import by_document
from dlmctl.sae.evaluation.placed import PlacedSae, as_inserted
from dlmctl.sae.ratios import Ratios
from dlmctl.sae.topk import Codes
from dlmctl.settings.sae import Insertion

MATCH = 0.9
"""Cosine above which two latents count as the same."""
ROWS = 1024
"""Latents that are compared with all others at once."""


class CodeSimilarity(Ratios):
    """Similarity of pairs of codes, as means over tokens."""

    def __init__(self) -> None:
        super().__init__(("jaccard", "code_cosine"))

    def add_codes(self, first: Coded, second: Coded) -> None:
        """Codes of the same tokens."""
        shared, either, cosine = compare(first.codes, second.codes)
        row, documents = first.row.cpu(), len(first.numbers)
        parts = [
            by_document(each, row, documents) for each in (shared / either.clamp(min=1), cosine)
        ]
        sums, tokens = zip(*parts, strict=True)
        self.add(torch.stack(sums), torch.stack(tokens))


def compare(first: Codes, second: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Compare the codes of the same N tokens.

    Returns:
        float64 [N] each: number of latents active in both codes, in either, cosine. Two codes
        without an active latent count as equal.
    """
    indices = torch.cat([first.indices, second.indices], dim=1)  # [N, 2K]
    values = torch.cat([first.values, second.values], dim=1).double()
    indices, order = indices.where(values > 0, -1).sort(dim=1)
    values = values.gather(1, order)
    # An active latent is in each code at most once, so after sorting only neighbours can be equal.
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
    seed: int = 0,
) -> list[dict[str, Any]]:
    """A record for each autoencoder; the measures on each model have `base_` or `tuned_` in front.

    Args:
        corpus: what each record says about the corpus.
        tuned_saes: autoencoders of the tuned model, matched by layer, K and positions.
        seed: of the noise of a control.

    Raises:
        DataError: the corpus has no token of the kind that an autoencoder is for.
        UsageError: the models have different tokenizers, or with scope `both` an autoencoder has no
            partner.
    """
    if base.mask_id != tuned.mask_id:
        raise UsageError(f"{base.name} and {tuned.name} have different mask tokens")
    saes, tuned_saes = as_inserted(saes, insertion), as_inserted(tuned_saes, insertion)
    policies = {"base": base, "tuned": tuned}
    sides = {name: Evaluation(p, saes, insertion, seed) for name, p in policies.items()}
    similarities = [CodeSimilarity() for _ in saes]
    sample, batches = sampled(batches)
    for side in sides.values():
        side.prepare(sample)
    for batch in batches:
        check_same_tokens(base, tuned, batch.masked_ids.unique().tolist())
        pairs = zip(*(side.add(batch) for side in sides.values()), strict=True)
        for similarity, (first, second) in zip(similarities, pairs, strict=True):
            similarity.add_codes(first, second)
    about = {"model": base.name, "tuned": tuned.name, **corpus, **about_insertion(base, insertion)}
    rows = []
    for number, placed in enumerate(saes):
        row = {**placed.about, **about, **similarities[number].row()}
        for name, side in sides.items():
            row |= {f"{name}_{key}": value for key, value in side.row(number).items()}
        row |= about_weights(placed)
        for other in tuned_saes:
            if other.about | {"sae": placed.about["sae"]} == placed.about:
                row |= match_decoders(placed.decoder, other.decoder)
        rows.append(row)
    return rows
