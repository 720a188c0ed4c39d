"""Whether the autoencoders of a model still fit it after more training (DLM-Scope, section 5).

For the same tokens under the same masks, the base model and the tuned one are compared: how well
the activations of each are given back, the loss on insertion in each, and how alike the codes are:

    jaccard      share of the active latents of a token that both have, |A n B| / |A u B|
    code_cosine  cosine of the codes

With autoencoders trained on the tuned model, `matched` is the mean over latents of the largest
cosine of their decoder row with a row of the other, and `matched_above` the share above 0.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.models.policy import Policy, check_same_tokens
from dlmctl.records.errors import UsageError
from dlmctl.sae.corpus import MaskedBatch
from dlmctl.sae.evaluation.evaluate import Evaluation, Placed
from dlmctl.sae.topk import Codes
from dlmctl.settings.sae import Scope

MATCH = 0.9
"""Cosine above which two latents count as the same."""
ROWS = 1024
"""Latents that are compared with all others at once."""


class Likeness:
    """How alike pairs of codes are, summed over tokens."""

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
    """Of codes of the same N tokens: latents active in both, in either, cosine; float64 [N]."""
    indices = torch.cat([first.indices, second.indices], dim=1)
    values = torch.cat([first.values, second.values], dim=1).double()
    indices, order = indices.sort(dim=1)
    values = values.gather(1, order)
    # A latent stands in each code once, so that a pair of neighbours is all that can be alike.
    both = (indices[:, 1:] == indices[:, :-1]) * values[:, 1:] * values[:, :-1]
    shared = (both > 0).sum(dim=1).double()
    either = (values > 0).sum(dim=1) - shared
    size = first.values.double().norm(dim=1) * second.values.double().norm(dim=1)
    # Two codes without an active latent are the same.
    cosine = (both.sum(dim=1) / size.clamp(min=1e-30)).where(either > 0, 1.0)
    return shared.where(either > 0, 1.0), either, cosine


def match_decoders(first: Tensor, second: Tensor) -> dict[str, float]:
    """How well rows [F, d] of norm 1 are found among rows [G, d]."""
    best = torch.cat([(part @ second.T).amax(dim=1) for part in first.split(ROWS)])
    return {"matched": float(best.mean()), "matched_above": float((best > MATCH).double().mean())}


def stability(
    base: Policy,
    tuned: Policy,
    batches: Iterable[MaskedBatch],
    saes: Sequence[Placed],
    scope: Scope,
    insert: bool,
    corpus: Mapping[str, Any],
    others: Sequence[Placed] = (),
) -> list[dict[str, Any]]:
    """A record for each autoencoder; `base_` and `tuned_` stand before the measures on each model.

    Args:
        corpus: what is said of it in each record.
        others: autoencoders of the tuned model; the one of like layer, K and positions is matched.

    Raises:
        DataError: the corpus has no token of the kind that one of them is for.
        UsageError: the models have different tokenizers.
    """
    if base.mask_id != tuned.mask_id:
        raise UsageError(f"{base.name} and {tuned.name} have different mask tokens")
    sides = [Evaluation(policy, saes, scope, insert) for policy in (base, tuned)]
    likeness = [Likeness() for _ in saes]
    for batch in batches:
        check_same_tokens(base, tuned, batch.masked_ids.unique().tolist())
        for seen, first, second in zip(likeness, *(side.add(batch) for side in sides), strict=True):
            seen.add(first, second)
    rows = []
    for number, placed in enumerate(saes):
        row = {**placed.about, "model": base.name, "tuned": tuned.name, **corpus}
        row |= likeness[number].row()
        for name, side in zip(("base", "tuned"), sides, strict=True):
            row |= {f"{name}_{key}": value for key, value in side.row(number).items()}
        for other in others:
            if other.about | {"sae": placed.name} == placed.about:
                row |= match_decoders(placed.sae.W_dec.detach(), other.sae.W_dec.detach())
        rows.append(row)
    return rows
