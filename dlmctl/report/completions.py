"""Completions token by token: the text of each token, and a number of the record for it.

Fields read: `tokens.completion` (ids), the chosen list of numbers, `rollout.model` (its tokenizer
spells the ids), `rollout.length` (tokens up to the first end-of-sequence), and for a header: `id`,
`sample`, `reward`, `advantage`, `verdict`, `prompt` or `messages`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import OnError, Record, faulty, nested
from dlmctl.report.plots import is_curve

Spell = Callable[[Sequence[int]], list[str]]
"""From ids to the texts of these tokens."""


class Completion(NamedTuple):
    """A completion to show."""

    record: Record
    by: str
    """The field of its numbers."""
    prompt: str
    texts: list[str]
    """Text of each token."""
    values: list[float | None]
    """Number of each token; None for null."""
    left_out: int
    """Tokens behind the first end-of-sequence, which are not among them."""
    error: str = ""
    """Why there is nothing to show."""


def completions(
    records: Iterable[Record],
    spell: Callable[[str], Spell],
    by: str | None = None,
    model: str | None = None,
    after_end: bool = False,
    on_error: OnError = "fail",
) -> Iterator[Completion]:
    """The completions of records, one by one.

    Args:
        spell: from a model's name to the function that spells its tokens.
        by: a field of numbers, with dots for one within fields; None is `weights`, else
            `rollout.order`.
        model: the model whose tokens they are; None goes by the record.
        after_end: include the tokens behind the first end-of-sequence.

    Raises:
        DataError: a record has no ids, or not a number for each (only with `on_error="fail"`).
    """
    for record in records:
        if "error" in record:
            yield _failed(record)
            continue
        try:
            yield _completion(record, spell, by, model, after_end)
        except DataError as error:
            error.where = error.where or record.where
            yield from map(_failed, faulty(record, error, on_error))


def title(record: Record) -> str:
    """The name of a completion: its prompt's id and its number in the group."""
    name = str(record.get("id", record.where))
    if "sample" in record:
        name = f"{name} sample {record['sample']}"
    unit = next((unit for unit in ("round", "step") if unit in record), None)
    return name if unit is None else f"{unit} {record[unit]}: {name}"


def facts(record: Record) -> list[str]:
    """What else a header says about a completion."""
    parts = []
    for name, form in (("reward", "g"), ("advantage", "+.3g")):
        value = record.get(name)
        if value is not None:
            number = format(value, form) if isinstance(value, (int, float)) else str(value)
            parts.append(f"{name} {number}")
    return parts + [_verdict(*item) for item in _items(record.get("verdict"))]


def reward(record: Record) -> float | None:
    """The reward if it is a number."""
    value = record.get("reward")
    return float(value) if isinstance(value, (int, float)) else None


def _completion(
    record: Record,
    spell: Callable[[str], Spell],
    by: str | None,
    model: str | None,
    after_end: bool,
) -> Completion:
    ids = _ids(record, "tokens.completion")
    if ids is None:
        raise DataError("no list of ids 'tokens.completion': 'dlmctl rollout' writes it")
    by = by or ("weights" if is_curve(record.get("weights")) else "rollout.order")
    values = _values(record, by, len(ids))
    name = model or nested(record, "rollout.model")
    if not isinstance(name, str):
        raise DataError("no 'rollout.model' says whose tokens these are: give --model")
    row = spell(name)
    length = nested(record, "rollout.length")
    count = len(ids) if after_end or not isinstance(length, int) else max(0, min(len(ids), length))
    prompt = _prompt(record, row)
    return Completion(record, by, prompt, row(ids)[:count], values[:count], len(ids) - count)


def _failed(record: Record) -> Completion:
    error = record["error"]
    message = error.get("message") if isinstance(error, dict) else error
    return Completion(record, "", "", [], [], 0, f"not shown: {message}")


def _ids(record: Record, name: str) -> list[int] | None:
    value = nested(record, name)
    # type(): true and false are no ids.
    sound = isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)
    return value if sound else None


def _values(record: Record, name: str, count: int) -> list[float | None]:
    value = nested(record, name)
    if is_curve(value) and len(value) == count:
        return value
    what = f"is a list of {len(value)}" if is_curve(value) else "is no list of numbers"
    others = ", ".join(_candidates(record, count)) or "no such field"
    raise DataError(f"'{name}' {what} for {count} tokens; --by could be: {others}")


def _candidates(record: Record, count: int) -> Iterator[str]:
    """Fields with a number for each token."""
    for name, value in record.items():
        inner = {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {}
        for path, entry in {name: value, **inner}.items():
            if is_curve(entry) and len(entry) == count and not path.startswith("tokens."):
                yield path


def _prompt(record: Record, row: Spell) -> str:
    """The prompt: as text, as a conversation, or as ids."""
    if isinstance(record.get("prompt"), str):
        return record["prompt"]
    messages = record.get("messages")
    if isinstance(messages, list):
        return "\n".join(_content(m.get("content")) for m in messages if isinstance(m, dict))
    return "".join(row(_ids(record, "tokens.prompt") or []))


def _content(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return "" if content is None else str(content)


def _verdict(name: str, detail: Any) -> str:
    """A verifier's judgement and its reason; without a judgement, what the verifier extracted."""
    known = dict(_items(detail))
    if "correct" not in known:
        parts = " ".join(f"{k}={v}" for k, v in known.items() if not isinstance(v, (dict, list)))
        return f"{name} {parts}".rstrip()
    judgement = f"{name} {'right' if known['correct'] else 'wrong'}"
    return f"{judgement}: {known['why']}" if known.get("why") else judgement


def _items(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []
