"""The record of a feature: firing statistics, effect on the logits, and windows as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.models.final_norm import through_final_norm
from dlmctl.models.float32_products import whole_products
from dlmctl.models.policy import Policy
from dlmctl.models.token_text import TokenTexts
from dlmctl.records.jsonl import Record
from dlmctl.sae.features.firing_stats import rounded
from dlmctl.sae.features.responses import Responses
from dlmctl.sae.topk import TopKSae

EFFECTS = 10
"""Tokens shown at either end of the effect on the logits."""
FEATURES, TOKENS = 256, 16384
"""Features and tokens of the vocabulary whose logits are computed at once."""


def feature_records(
    responses: Responses,
    slots: Sequence[int],
    policy: Policy,
    sae: TopKSae,
    facts: Mapping[str, Any],
) -> Iterator[Record]:
    """A record for each of these slots; all contain `facts`, among them `sae` and `t`."""
    texts, stats = TokenTexts(policy.tokenizer), responses.stats
    corpus = {
        "documents": stats.documents,
        "tokens": stats.tokens,
        "alive": int(stats.alive.sum()),
    }
    for first in range(0, len(slots), FEATURES):
        part = list(slots[first : first + FEATURES])
        directions = sae.W_dec[responses.latents[part].to(sae.W_dec.device)]
        effects = logit_effects(policy, directions, texts)
        for slot, effect in zip(part, effects, strict=True):
            feature = int(responses.latents[slot])
            yield Record(
                id=f"{facts['sae']}/{feature}",
                feature=feature,
                **facts,
                corpus=corpus,
                **stats.measures(slot),
                time_profile=stats.time_profile(slot) if facts["t"] else None,
                logits=effect,
                windows=responses.windows.of(slot, texts),
            )


def logit_effects(
    policy: Policy, directions: Tensor, texts: TokenTexts
) -> list[dict[str, list[dict[str, Any]]]]:
    """The tokens whose logits a step along each direction [n, d] raises and lowers the most.

    The direction goes through the gain of the last norm, which divides by the size of the
    activation too, one number for all tokens that is left out, and through the matrix of the output
    head. The blocks between and a head's own layer are skipped. Tokens that look alike are named
    once.
    """
    weight = policy.head.projection.weight.detach()[: policy.vocab_size]
    rows = through_final_norm(policy, directions.detach().float().to(weight.device))
    with whole_products():
        parts = [part.float() @ rows.T for part in weight.split(TOKENS)]
    logits = torch.cat(parts).T.cpu()  # [n, V]
    some = min(4 * EFFECTS, logits.shape[1])
    sides = {"top": logits.topk(some), "bottom": logits.topk(some, largest=False)}
    return [
        {
            side: _distinct(best.indices[i].tolist(), best.values[i].tolist(), texts)
            for side, best in sides.items()
        }
        for i in range(len(rows))
    ]


def _distinct(ids: list[int], values: list[float], texts: TokenTexts) -> list[dict[str, Any]]:
    shown: dict[str, float] = {}
    for token, value in zip(ids, values, strict=True):
        shown.setdefault(texts(token), rounded(value))
    return [{"token": text, "logit": value} for text, value in list(shown.items())[:EFFECTS]]
