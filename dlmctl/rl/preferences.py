"""Offline preferences: a row with `chosen` and `rejected` as a group of two completions.

Rows are as in TRL: a `prompt` (a text, or messages) or `messages`, with two texts or two lists of
messages that end with the assistant's; or such lists that begin with the prompt. `chosen` gets
reward 1 and `rejected` 0, which is all that an objective of preferences looks at. An id is the
number of the row, so that a row that comes again has masks of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import OnError, Record, faulty, located

SIDES = ("chosen", "rejected")
REPLACED = {*SIDES, "tokens", "completion", "reward", "advantage", "advantage_settings", "elbo"}
"""Fields of a row that its two completions do not have from it."""


class _Answer(NamedTuple):
    """One side of a row."""

    text: str
    before: list[Any]
    """The messages before it, if it says them."""


def is_preference(record: Record) -> bool:
    """Whether a record is a row of preferences."""
    return any(side in record for side in SIDES)


def preference_pairs(records: Iterable[Record], on_error: OnError) -> Iterator[Record]:
    """Two records for each row, `chosen` first.

    Raises:
        DataError: a row lacks a side or its prompt, or both sides are the same (only with
            `on_error="fail"`).
    """
    for number, record in enumerate(records):
        if "error" in record:
            yield record
            continue
        try:
            pair = _pair(record, number)
        except DataError as error:
            yield from faulty(record, error, on_error)
        else:
            yield from pair


def _pair(record: Record, number: int) -> list[Record]:
    answers = [_answer(record, side) for side in SIDES]
    chosen, rejected = answers
    if chosen.text == rejected.text:
        raise DataError("'chosen' and 'rejected' are the same text", record.where)
    if chosen.before and rejected.before and chosen.before != rejected.before:
        raise DataError("'chosen' and 'rejected' answer different messages", record.where)
    shared = {name: value for name, value in record.items() if name not in REPLACED}
    if before := chosen.before or rejected.before:
        shared["messages"] = before
    if not shared.get("messages") and not shared.get("prompt"):
        raise DataError(
            "the row has no prompt: give 'prompt' or 'messages', or begin both sides with it",
            record.where,
        )
    halves = []
    for sample, (side, answer) in enumerate(zip(SIDES, answers, strict=True)):
        own = {"id": f"pair-{number}", "sample": sample, "completion": answer.text}
        judged = {"reward": 1.0 - sample, "preference": side, "rollout": {"samples": 2}}
        halves.append(located({**shared, **own, **judged}, record.where))
    return halves


def _answer(record: Record, side: str) -> _Answer:
    """A side of a row, a text or messages; raises DataError if it is neither, or empty."""
    value = record.get(side)
    before: list[Any] = []
    if isinstance(value, list) and value:
        *before, last = value
        answers = isinstance(last, dict) and last.get("role") == "assistant"
        value = last.get("content") if answers else None
    if isinstance(value, str) and value:
        return _Answer(value, before)
    fault = "is missing" if record.get(side) is None else "is something else"
    raise DataError(
        f"field '{side}' {fault}, expected a text, or messages that end with the assistant's",
        record.where,
    )
