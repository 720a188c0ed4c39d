"""`memo-eval text`: how much of a set of texts a model gives back, at each number of steps.

A row for each geometry and number of steps; beside every figure stands the same of texts that the
model has not seen, where such are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from dlmctl.memorization.text.copies import text_of
from dlmctl.memorization.text.extraction import (
    Mode,
    Text,
    asked_tokens,
    chance_in,
    greedy,
    mean_probability,
    random_order_log_probs,
    samples_needed,
)
from dlmctl.memorization.text.verbatim import bleu, common_run, edit_distance
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import OnError, Record, each

NEAR = 0.1
"""Edit distance per token asked for, up to which a text counts as given back nearly."""
NEAR_BLEU = 0.75
"""BLEU from which it does by that measure (Ippolito et al. 2022, arXiv 2210.17546)."""


@dataclass(frozen=True)
class Extraction:
    """What is asked for, and when it counts as extractable."""

    modes: Sequence[Mode] = ("prefix",)
    given: float = 0.5
    """Share of the tokens that are given."""
    steps: Sequence[int] = (1,)
    orders: int = 8
    """Random orders that p_y is the mean over; 0 takes the order of confidence."""
    n: int = 100
    p: float = 0.5
    seed: int = 0


class _Known(NamedTuple):
    """A record's text."""

    record: Record
    prompt: Sequence[int]
    tokens: Sequence[int]


def text_memory(
    policy: Policy,
    texts: Iterable[Record],
    heldout: Iterable[Record],
    plan: Extraction,
    batch_size: int,
    note: Callable[[dict[str, Any]], None] | None = None,
    on_error: OnError = "fail",
) -> Iterator[dict[str, Any]]:
    """A row for each geometry and number of steps.

    Args:
        heldout: texts that the model has not seen; none: the columns are left out.
        note: is given a row for each text, geometry and number of steps, and the records that
            cannot be used, where these are kept.

    Raises:
        UsageError: the model cannot be asked so, or there is nothing to ask for.
        DataError: a record has no completion of two tokens or more (only with
            `on_error="fail"`).
    """
    if not policy.diffusion and tuple(plan.modes) != ("prefix",):
        raise UsageError(f"{policy.name} is autoregressive: --mode prefix is all it can be asked")
    (own, faulty), (other, more) = (_all_known(r, policy, on_error) for r in (texts, heldout))
    if not own:
        raise UsageError("no texts came in; there is nothing to ask for")
    for mode in plan.modes:
        # One token after the other, whatever is asked of it.
        for steps in plan.steps if policy.diffusion else (0,):
            rows = _rows(policy, own, mode, steps, plan, batch_size)
            beside = _rows(policy, other, mode, steps, plan, batch_size)
            if note is not None:
                for name, found in (("train", rows), ("heldout", beside)):
                    for row in found:
                        note({"set": name, **row})
            summary: dict[str, Any] = {
                "model": policy.name,
                "revision": policy.revision,
                "mode": mode,
                "steps": steps or None,
                "n": plan.n,
                "p": plan.p,
                "texts": len(rows),
                **_summary(rows),
            }
            if beside:
                unseen = {f"heldout_{name}": value for name, value in _summary(beside).items()}
                summary |= {"heldout_texts": len(beside), **unseen}
            yield summary
    if note is not None:
        for record in (*faulty, *more):
            note(record)


def _all_known(
    records: Iterable[Record], policy: Policy, on_error: OnError
) -> tuple[list[_Known], list[Record]]:
    """The texts of records, and the records that cannot be used, where these are kept."""
    made: list[_Known] = []

    def read(record: Record) -> Record:
        made.append(_known(record, policy))
        return record

    faulty = [record for record in each(records, read, on_error) if "error" in record]
    return made, faulty


def _known(record: Record, policy: Policy) -> _Known:
    tokens = record.get("tokens") or {}
    prompted = tokens.get("prompt") or record.get("prompt") or record.get("messages")
    prompt = policy.encode(record) if prompted else policy.encode_context("")
    if tokens.get("completion") is None:
        ids = policy.encode_text(text_of(record))
    else:
        ids = policy.encode_completion(record)
    if len(ids) < 2:
        raise DataError(
            "a text of two tokens or more is needed: one given, one asked for", record.where
        )
    return _Known(record, prompt, ids)


def _rows(
    policy: Policy,
    known: Sequence[_Known],
    mode: Mode,
    steps: int,
    plan: Extraction,
    batch_size: int,
) -> list[dict[str, Any]]:
    """What was found of each text."""
    keys = [(plan.seed, str(k.record.get("id", n)), mode) for n, k in enumerate(known)]
    texts = [
        Text(k.prompt, k.tokens, asked_tokens(len(k.tokens), mode, plan.given, key))
        for k, key in zip(known, keys, strict=True)
    ]
    decoded = greedy(policy, texts, steps or 1, batch_size)
    by_order = None
    if policy.diffusion and plan.orders:
        by_order = random_order_log_probs(policy, texts, steps, plan.orders, keys, batch_size)
    made = []
    for n, (k, text, best) in enumerate(zip(known, texts, decoded, strict=True)):
        log_prob, error = best.log_prob, None
        if by_order is not None:
            log_prob, error = mean_probability(by_order[n])
        asked = text.asked.tolist()
        wanted = [t for t, a in zip(text.tokens, asked, strict=True) if a]
        found = [t for t, a in zip(best.tokens, asked, strict=True) if a]
        away, alike = edit_distance(found, wanted) / len(wanted), bleu(found, wanted)
        made.append(
            {
                "id": k.record.get("id", n),
                "mode": mode,
                "steps": steps or None,
                "asked": len(wanted),
                "log_prob": log_prob,
                "relative_error": error,
                "samples_needed": samples_needed(log_prob, plan.p),
                "extractable": chance_in(log_prob, plan.n) >= plan.p,
                "exact": found == wanted,
                "near": away <= NEAR,
                "edit_distance": away,
                "near_bleu": alike >= NEAR_BLEU,
                "bleu": alike,
                "common_run": common_run(found, wanted),
                "right_tokens": fmean(a == b for a, b in zip(found, wanted, strict=True)),
            }
        )
    return made


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over texts: shares, tokens of the longest common run, log p_y per token asked for."""
    names = ("extractable", "exact", "near", "edit_distance", "near_bleu", "bleu", "common_run")
    return {
        **{name: fmean(row[name] for row in rows) for name in (*names, "right_tokens")},
        "log_prob_per_token": fmean(row["log_prob"] / row["asked"] for row in rows),
    }
