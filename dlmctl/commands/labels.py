"""The option --set NAME=VALUE: fields of a summary that say what it is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dlmctl.records.errors import UsageError

Labels = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        show_default="none",
        help="A field of the summary, as role=teacher; repeatable.",
    ),
]


def label_fields(labels: Sequence[str] | None) -> dict[str, Any]:
    """Fields of NAME=VALUE, numbers as such; raises UsageError."""
    made: dict[str, Any] = {}
    for label in labels or []:
        name, equals, value = label.partition("=")
        if not name or not equals:
            raise UsageError(f"--set {label} is not NAME=VALUE")
        made[name] = number_or_text(value)
    return made


def number_or_text(text: str) -> int | float | str:
    """A finite number where it is one."""
    for kind in (int, float):
        try:
            number: int | float = kind(text)
        except ValueError:
            continue
        return number if math.isfinite(number) else text
    return text


def labelled(fields: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row behind the fields; raises UsageError where it has one of them itself."""
    for name in fields:
        if name in row:
            raise UsageError(f"--set {name}=…: the summary has a field of that name")
    return {**fields, **row}
