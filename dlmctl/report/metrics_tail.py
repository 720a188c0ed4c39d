"""metrics.jsonl of a run, read while the run writes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

METRICS = "metrics.jsonl"
LINES = ("layer", "k", "positions")
"""Fields that distinguish the lines of a run, if it has any of them."""
EVALUATION = "eval"
"""Field of a record of an evaluation, which is no step; and the name of the line of these."""


class MetricsTail:
    """The records behind those that are done with."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / METRICS
        self.offset = 0
        """Bytes that are done with."""
        self.cut = False
        """Whether the last look found that the file was cut, as by a run that resumes."""

    def records(self) -> Iterator[tuple[Mapping[str, Any], int]]:
        """The whole lines that have a step, each with where it ends; none if there is no file."""
        self.cut = False
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return
        with stream:
            # Begin again where no line ends there any more.
            stream.seek(max(0, self.offset - 1))
            if self.offset and stream.read(1) != b"\n":
                self.offset, self.cut = 0, True
                stream.seek(0)
            end = self.offset
            for text in stream:
                if not text.endswith(b"\n"):
                    return
                end += len(text)
                with contextlib.suppress(orjson.JSONDecodeError):
                    record = orjson.loads(text)
                    if isinstance(record, dict) and type(record.get("step")) is int:
                        yield record, end


def line_of(record: Mapping[str, Any]) -> str:
    """Name of the line of a run that a record belongs to; empty if the run has only one.

    Evaluations are a line of their own: they have the steps of checkpoints.
    """
    if EVALUATION in record:
        return EVALUATION
    return ",".join(f"{name}={record[name]}" for name in LINES if name in record)


def numbers_of(record: Mapping[str, Any], x: str = "step") -> dict[str, float]:
    """The numbers of a record apart from its step; those of a field within a field as
    `field/inner`."""
    return dict(_numbers(record, (x, *LINES)))


def _numbers(record: Mapping[str, Any], leave_out: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", v) for inner, v in _numbers(value, ()))
        elif isinstance(value, int | float) and name not in leave_out:
            yield name, float(value)
