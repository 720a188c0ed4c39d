"""Resuming a file of records that a killed command left as FILE.partial.

The input is read again from its beginning. Fields that a stage does not know pass through
unchanged, so that a line belongs to an input record if it has all its fields; walking through both
together shows where the command was. Noise and masks depend on a record's id and sample, not on its
place, so that the rest comes out as it would have.

If records are computed in batches, the walk goes back to the beginning of one: the floating-point
noise of a record depends on the others in its batch. The finished file is then, byte for byte, that
of a command that was never stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record, dump, parse_record
from dlmctl.records.locks import Lock, hold


class Written(NamedTuple):
    """What the file has before the lines of an input record."""

    lines: int
    errors: int
    """Lines with an `error`."""


Begins = Callable[[Record, Written], bool]
"""Whether a batch begins with this input record; called for each of them in order."""


def always(_record: Record, _written: Written) -> bool:
    """`Begins` of a stage that takes its records one by one."""
    return True


@dataclass(frozen=True)
class Rule:
    """Which lines a stage makes of an input record."""

    writes: frozenset[str]
    """The fields that the stage writes; all others pass through."""
    samples: int | None = None
    """Lines per record, numbered by `sample`; None is one line without a number."""
    skips: bool = False
    """Whether a record may leave no line."""
    begins: Begins = always
    made_by: Mapping[str, Any] = field(default_factory=dict)
    """Fields, also nested ones, that every line without an `error` has."""


class Rest(NamedTuple):
    """Where a stage resumes."""

    size: int
    """Bytes of the file that stay."""
    lines: int
    """Lines of the file that stay."""
    records: Iterator[Record]
    """The input records whose lines are missing."""


class _Lines:
    """The whole lines of a file; `now` is the next one, None at the end."""

    def __init__(self, stream: Iterable[bytes], name: str) -> None:
        self._stream, self._name = iter(stream), name
        self.size, self.number, self.errors = 0, 0, 0
        """Bytes, lines, and lines with an error, before the next one."""
        self._raw = b""
        self._read()

    @property
    def where(self) -> str:
        return f"{self._name}:{self.number + 1}"

    def take(self, line: Record) -> None:
        """Count `now` and read the next line."""
        self.size += len(self._raw)
        self.number += 1
        self.errors += "error" in line
        self._read()

    def _read(self) -> None:
        self._raw = next(self._stream, b"")
        whole = self._raw.endswith(b"\n")  # else it was cut off
        self.now: Record | None = parse_record(self._raw, self.where) if whole else None


def find_rest(
    records: Iterable[Record],
    stream: Iterable[bytes],
    rule: Rule,
    name: str,
    note: Callable[[Record], None] | None = None,
) -> Rest:
    """Walk through the input and the lines that were made of it.

    Args:
        stream: lines of the file, with their ends.
        name: of the file, for messages.
        note: is called with each line.

    Raises:
        DataError: a line was made of something else.
    """
    source, lines = iter(records), _Lines(stream, name)
    rule = replace(rule, made_by=orjson.loads(dump(rule.made_by)))
    size = number = 0
    again: list[Record] = []
    for record in source:
        if rule.begins(record, Written(lines.number, lines.errors)):
            size, number, again = lines.size, lines.number, []
        again.append(record)
        if lines.now is None or not _take_lines(record, lines, rule, note):
            break
    else:
        if lines.now is not None:
            raise _misfit(lines, "the input has no record for it")
        size, number, again = lines.size, lines.number, []
    return Rest(size, number, chain(again, source))


def _take_lines(
    record: Record, lines: _Lines, rule: Rule, note: Callable[[Record], None] | None
) -> bool:
    """Take the lines of a record; returns whether all are there."""
    plain, taken = orjson.loads(dump(record)), 0
    while taken < (rule.samples or 1):
        line = lines.now
        if line is None:
            return False
        error = "error" in line and not taken
        numbered = rule.samples is None or error or line.get("sample") == taken
        if not numbered or not _made_of(plain, line, rule.writes):
            if taken or not rule.skips:
                raise _misfit(lines, f"it was not made of {record.where or 'the next record'}")
            return True
        if "error" not in line and not contains(line, rule.made_by):
            raise _misfit(lines, "it was made by another model, or with other options")
        lines.take(line)
        if note is not None:
            note(line)
        if error:
            break
        taken += 1
    return True


def _made_of(record: Mapping[str, Any], line: Record, writes: frozenset[str]) -> bool:
    missing = object()
    return all(name in writes or line.get(name, missing) == value for name, value in record.items())


def contains(value: Any, part: Any) -> bool:
    """Whether a JSON value has all the fields of another, nested ones too, with their values."""
    if not isinstance(part, Mapping):
        return bool(value == part)
    return isinstance(value, Mapping) and all(
        name in value and contains(value[name], inner) for name, inner in part.items()
    )


def _misfit(lines: _Lines, why: str) -> DataError:
    return DataError(
        f"{why}: give the command and the input that began the file, or leave --resume out to "
        "begin it again",
        lines.where,
    )


class Resume:
    """The output of a stage, which a later call can resume."""

    def __init__(self, output: str, wanted: bool) -> None:
        """Lock FILE.partial if there is one to resume.

        Raises:
            UsageError: standard output cannot be resumed.
            TryAgainError: another process writes the file.
        """
        if wanted and output == "-":
            raise UsageError("--resume needs a file: give -o FILE too")
        self.partial = Path(f"{output}.partial")
        self.size, self.lines = 0, 0
        """Bytes and lines of it that stay."""
        exists = wanted and self.partial.exists()
        self._lock: Lock | None = hold(self.partial, output) if exists else None
        self.done = wanted and not exists and Path(output).is_file()
        """Whether there is nothing to do."""
        if self.done:
            print(f"dlmctl: {output} exists already; nothing to do", file=sys.stderr)

    def rest(
        self,
        records: Iterator[Record],
        rule: Rule,
        note: Callable[[Record], None] | None = None,
    ) -> Iterator[Record]:
        """The input records that are not done; raises as `find_rest`."""
        if self._lock is None:
            return records
        with self.partial.open("rb") as stream:
            rest = find_rest(records, stream, rule, str(self.partial), note)
        self.size, self.lines = rest.size, rest.lines
        print(f"dlmctl: resuming after {self.lines} records of {self.partial}", file=sys.stderr)
        return rest.records
