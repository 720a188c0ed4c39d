"""One of N parts of an input, for N processes that know nothing of each other: `--shard I/N`.

The parts are contiguous, and cut only between groups, so that the outputs of all parts, one after
another, are the output of a single run. Where to cut depends on the number of records, which takes
a pass over the input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.groups import group_key
from dlmctl.records.jsonl import (
    OnError,
    Record,
    parse_lines,
    parse_record,
    read_lines,
    read_records,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """Part `number`, from 1 to `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def bounds(self, total: int) -> tuple[int, int]:
        """First item of the part and the one behind its last, of `total` items from 0 on.

        Parts differ in size by at most one.
        """
        first, end = (-(-total * part // self.count) for part in (self.number - 1, self.number))
        return first, end


def parse_shard(text: str | None) -> Shard | None:
    """The shard that `--shard` names; raises UsageError if it names none."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if not match:
        raise UsageError(f"--shard {text} is not I/N, as in 1/8")
    shard = Shard(*map(int, match.groups()))
    if not 1 <= shard.number <= shard.count:
        n = max(shard.count, 1)
        raise UsageError(
            f"--shard {text}: there is no such part; they count from 1: 1/{n} is the first, "
            f"{n}/{n} the last (of a Slurm array, --array=1-{n})"
        )
    return shard


def cut(items: Iterable[T], key: Callable[[T], object], total: int, shard: Shard) -> Iterator[T]:
    """The items of a shard, in their order; neighbours with equal keys stay together.

    Args:
        key: the group of an item; an item with None goes with the one before it.
        total: number of items. If it turns out to be wrong, every item is still in exactly one
            shard.
    """
    first, end = shard.bounds(total)
    start, last = 0, None
    for index, item in enumerate(items):
        now = key(item)
        if now is not None and now != last:
            start, last = index, now
        if start >= end and shard.number < shard.count:
            return
        if start >= first:
            yield item


def read_shard(
    files: Sequence[str], shard: Shard | None, on_error: OnError = "fail"
) -> Iterator[Record]:
    """The records of `read_records` in a shard, with whole groups; None is all of them.

    Lines of other shards are read only to find groups: their faults are not reported.

    Raises:
        UsageError: a file cannot be read twice.
        MissingInputError, DataError: as `read_records`.
    """
    if shard is None:
        return read_records(files, on_error)
    check_files(files)
    total = sum(1 for _ in read_lines(files))
    return parse_lines(cut(read_lines(files), _group, total, shard), on_error)


def check_files(files: Sequence[str]) -> None:
    """Raise UsageError unless there are files, and each can be read twice."""
    if not files or "-" in files:
        raise UsageError(
            "--shard goes by how long the input is, which standard input does not tell: give a FILE"
        )
    for name in files:
        path = Path(name)
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise UsageError(
                f"--shard reads its input twice, which {name} does not allow: give a regular FILE"
            )


def _group(labelled: tuple[str, bytes]) -> object:
    """The group of a line, as `groups` sees it; None for a line that it skips."""
    where, line = labelled
    try:
        record = parse_record(line, where)
    except DataError:
        return None
    if "error" in record:
        return None
    try:
        return group_key(record)
    except (DataError, AttributeError):
        return object()  # equal to no other key
