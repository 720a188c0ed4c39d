"""`memo-eval text`: how many texts a model reconstructs from a part, at each number of steps.

One row per geometry and number of steps; if there are texts that the model has not seen, it also
has every figure for these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from dlmctl.memorization.text.copies import text_of
from dlmctl.memorization.text.extraction import (
    PartialText,
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
from dlmctl.settings.memorization import Extraction, Mode

NEAR = 0.1
"""Edit distance per token asked for, up to which a text counts as nearly reconstructed."""
NEAR_BLEU = 0.75
"""BLEU from which on it does by that measure (Ippolito et al. 2022, arXiv 2210.17546)."""


class _Text(NamedTuple):
    """A record's text as tokens."""

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
        heldout: texts that the model has not seen; without any the rows lack their figures.
        note: called with a row for each text, geometry and number of steps, and with the records
            that cannot be used, if these are kept.

    Raises:
        UsageError: an autoregressive model is asked for anything but what follows a prefix, or
            there are no texts.
        DataError: a record has no completion of two tokens or more (only with
            `on_error="fail"`).
    """
    if not policy.diffusion and plan.modes != ["prefix"]:
        raise UsageError(f"{policy.name} is autoregressive: --mode prefix is all it can be asked")
    (seen, faulty), (unseen, more) = (_texts(r, policy, on_error) for r in (texts, heldout))
    if not seen:
        raise UsageError("no texts came in; there is nothing to ask for")
    for mode in plan.modes:
        # An autoregressive model decides one token after the other, whatever --steps says.
        for steps in plan.step_counts if policy.diffusion else (0,):
            rows = _rows(policy, seen, mode, steps, plan, batch_size)
            others = _rows(policy, unseen, mode, steps, plan, batch_size)
            if note is not None:
                for name, part in (("train", rows), ("heldout", others)):
                    for row in part:
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
            if others:
                figures = {f"heldout_{name}": value for name, value in _summary(others).items()}
                summary |= {"heldout_texts": len(others), **figures}
            yield summary
    if note is not None:
        for record in (*faulty, *more):
            note(record)


def _texts(
    records: Iterable[Record], policy: Policy, on_error: OnError
) -> tuple[list[_Text], list[Record]]:
    """The texts of records, and the records that cannot be used, if these are kept."""
    texts: list[_Text] = []

    def read(record: Record) -> Record:
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
        texts.append(_Text(record, prompt, ids))
        return record

    faulty = [record for record in each(records, read, on_error) if "error" in record]
    return texts, faulty


def _rows(
    policy: Policy,
    texts: Sequence[_Text],
    mode: Mode,
    steps: int,
    plan: Extraction,
    batch_size: int,
) -> list[dict[str, Any]]:
    """The figures of each text."""
    keys = [(plan.seed, str(text.record.get("id", n)), mode) for n, text in enumerate(texts)]
    parts = [
        PartialText(text.prompt, text.tokens, asked_tokens(len(text.tokens), mode, plan.given, key))
        for text, key in zip(texts, keys, strict=True)
    ]
    decoded = greedy(policy, parts, steps or 1, batch_size)
    by_order = None
    if policy.diffusion and plan.orders:
        by_order = random_order_log_probs(policy, parts, steps, plan.orders, keys, batch_size)
    rows = []
    for n, (text, part, best) in enumerate(zip(texts, parts, decoded, strict=True)):
        log_prob, error = best.log_prob, None
        if by_order is not None:
            log_prob, error = mean_probability(by_order[n])
        places = part.asked.nonzero()[:, 0].tolist()
        expected = [part.tokens[place] for place in places]
        decided = [best.tokens[place] for place in places]
        distance = edit_distance(decided, expected) / len(expected)
        similarity = bleu(decided, expected)
        rows.append(
            {
                "id": text.record.get("id", n),
                "mode": mode,
                "steps": steps or None,
                "asked": len(expected),
                "log_prob": log_prob,
                "relative_error": error,
                "samples_needed": samples_needed(log_prob, plan.p),
                "extractable": chance_in(log_prob, plan.n) >= plan.p,
                "exact": decided == expected,
                "near": distance <= NEAR,
                "edit_distance": distance,
                "near_bleu": similarity >= NEAR_BLEU,
                "bleu": similarity,
                "common_run": common_run(decided, expected),
                "right_tokens": fmean(a == b for a, b in zip(decided, expected, strict=True)),
            }
        )
    return rows


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over texts: shares, tokens of the longest common run, log p_y per token asked for."""
    names = ("extractable", "exact", "near", "edit_distance", "near_bleu", "bleu", "common_run")
    return {
        **{name: fmean(row[name] for row in rows) for name in (*names, "right_tokens")},
        "log_prob_per_token": fmean(row["log_prob"] / row["asked"] for row in rows),
    }
