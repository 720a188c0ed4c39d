"""The record of a feature: its measures, its effect on the logits, its windows as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.models.policy import Policy
from dlmctl.models.token_text import TokenTexts
from dlmctl.records.jsonl import Record
from dlmctl.sae.features.activity import Activity, histogram_edges
from dlmctl.sae.features.responses import Findings
from dlmctl.sae.features.windows import Window
from dlmctl.sae.topk import TopKSae

EFFECTS = 10
"""Tokens shown at either end of the effect on the logits."""
FEATURES, TOKENS = 256, 16384
"""Features and tokens of the vocabulary whose logits are made at once."""


def feature_records(
    findings: Findings,
    slots: Sequence[int],
    policy: Policy,
    sae: TopKSae,
    facts: Mapping[str, Any],
) -> Iterator[Record]:
    """A record for each of these features; `facts` stand in all, `sae` and `t` among them."""
    texts, activity = TokenTexts(policy.tokenizer), findings.activity
    corpus = {
        "documents": activity.documents,
        "tokens": activity.tokens,
        "alive": int(activity.alive.sum()),
    }
    for first in range(0, len(slots), FEATURES):
        part = list(slots[first : first + FEATURES])
        directions = sae.W_dec[findings.latents[part].to(sae.W_dec.device)]
        effects = logit_effects(policy, directions, texts)
        for slot, effect in zip(part, effects, strict=True):
            feature = int(findings.latents[slot])
            yield Record(
                id=f"{facts['sae']}/{feature}",
                feature=feature,
                **facts,
                corpus=corpus,
                **_measures(activity, slot),
                time_profile=_time_profile(activity, slot) if facts["t"] else None,
                logits=effect,
                windows={
                    kind: [_as_text(window, texts) for window in found]
                    for kind, found in findings.windows.of(slot).items()
                },
            )


def logit_effects(
    policy: Policy, directions: Tensor, texts: TokenTexts
) -> list[dict[str, list[dict[str, Any]]]]:
    """The tokens whose logits a step along each direction [n, d] raises and lowers the most.

    The direction goes straight through the matrix of the output head: the blocks between, the last
    norm, and a head's own layer are passed over. Tokens that look alike are named once.
    """
    weight = policy.head.projection.weight.detach()[: policy.vocab_size]
    rows = directions.detach().float().to(weight.device)
    logits = torch.cat([part.float() @ rows.T for part in weight.split(TOKENS)]).T.cpu()
    some = min(4 * EFFECTS, logits.shape[1])
    sides = {"top": logits.topk(some), "bottom": logits.topk(some, largest=False)}
    return [
        {
            side: _distinct(found.indices[i].tolist(), found.values[i].tolist(), texts)
            for side, found in sides.items()
        }
        for i in range(len(rows))
    ]


def _distinct(ids: list[int], values: list[float], texts: TokenTexts) -> list[dict[str, Any]]:
    shown: dict[str, float] = {}
    for token, value in zip(ids, values, strict=True):
        shown.setdefault(texts(token), _short(value))
    return [{"token": text, "logit": value} for text, value in list(shown.items())[:EFFECTS]]


def _measures(activity: Activity, slot: int) -> dict[str, Any]:
    count, total = int(activity.count[slot]), float(activity.total[slot])
    filled = activity.histogram[slot].nonzero().squeeze(1).tolist() or [0]
    first, last = filled[0], filled[-1]
    histogram: dict[str, list[float]] = {"edges": [], "counts": []}
    if count:
        histogram = {
            "edges": [_short(edge) for edge in histogram_edges(first, last)],
            "counts": activity.histogram[slot, first : last + 1].tolist(),
        }
    return {
        "active": count,
        "firing_rate": _short(count / max(1, activity.tokens)),
        "mean": _short(total / count) if count else None,
        "max": _short(float(activity.largest[slot])),
        "histogram": histogram,
    }


def _time_profile(activity: Activity, slot: int) -> dict[str, Any]:
    tokens = activity.level_tokens.tolist()
    counts, totals = activity.level_count[slot].tolist(), activity.level_total[slot].tolist()
    return {
        "edges": [_short(edge) for edge in activity.level_edges()],
        "tokens": tokens,
        "firing_rate": [_short(c / n) if n else None for c, n in zip(counts, tokens, strict=True)],
        "mean": [_short(s / c) if c else None for s, c in zip(totals, counts, strict=True)],
    }


def _as_text(window: Window, texts: TokenTexts) -> dict[str, Any]:
    return {
        **window.document,
        "position": window.position,
        "middle": window.middle,
        "t": _short(window.level),
        "tokens": texts.row(window.ids),
        "masked": window.hidden,
        "activations": [_short(value) for value in window.activations],
    }


def _short(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")
