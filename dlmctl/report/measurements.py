"""Means of records that have measures instead of a completion, such as those of autoencoders."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from dlmctl.records.jsonl import Record

NAMES = ("layer", "k", "positions", "method")
"""Fields that distinguish such records by default."""


def is_measurement(record: Record) -> bool:
    """Whether a record has numbers, but neither a completion nor a reward."""
    sampled = {"completion", "reward", "verdict", "rollout", "prompt", "error"} & set(record)
    return not sampled and any(_is_number(value) for value in record.values())


def averages(records: Iterable[Record], by: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each group of records with equal values of `by`, and one for all if several.

    Every number becomes its mean; if there are several records, the standard error follows, with
    `_se` behind its name. A standard error that the records have themselves, which is of another
    spread, stays only if there is a single record.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if "error" not in record:
            key = tuple(_label(record.get(name)) for name in by)
            groups.setdefault(key, []).append(record)
    rows = [
        {**dict(zip(by, key, strict=True)), **_means(members, by)}
        for key, members in groups.items()
    ]
    if len(rows) > 1:
        every = [record for members in groups.values() for record in members]
        rows.append({**dict.fromkeys(by, "all"), **_means(every, by)})
    return rows


def present(record: Record) -> list[str]:
    """The default names that a record has; `sae` if it has none of them."""
    return [name for name in NAMES if name in record] or ["sae"]


def _means(records: Sequence[Record], by: Sequence[str]) -> dict[str, Any]:
    columns: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in by and _is_number(value):
                columns.setdefault(name, []).append(value)
    row: dict[str, Any] = {"records": len(records)}
    for name, values in columns.items():
        measure = name.removesuffix("_se")
        if measure != name and len(columns.get(measure, [])) > 1:
            continue
        row[name] = statistics.fmean(values)
        if len(values) > 1:
            row[f"{name}_se"] = statistics.stdev(values) / math.sqrt(len(values))
    return row


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _label(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else "-"
