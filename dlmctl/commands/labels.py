"""The option --set NAME=VALUE: fields that say what a summary is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob

Labels = Annotated[
    list[str] | None,
    Knob(
        "Add a field to the summary, as role=teacher; repeatable.",
        "--set",
        metavar="NAME=VALUE",
        shown_default="none",
    ),
]


def label_fields(labels: Sequence[str] | None) -> dict[str, Any]:
    """Fields of NAME=VALUE, with numbers as such; raises UsageError."""
    fields: dict[str, Any] = {}
    for label in labels or []:
        name, equals, value = label.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {label} is not NAME=VALUE")
        fields[name] = number_or_text(value)
    return fields


def number_or_text(text: str) -> int | float | str:
    """The finite number that a text is, else the text."""
    for kind in (int, float):
        try:
            number: int | float = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def labelled(fields: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row with the fields before it; raises UsageError if it has one of their names."""
    for name in fields:
        if name in row:
            raise UsageError(f"--set {name}=…: the summary has a field of that name")
    return {**fields, **row}
