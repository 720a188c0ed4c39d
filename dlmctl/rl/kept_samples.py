"""Completions of a run that are kept for a person to read: RUN/samples.jsonl.

At most `MOST` rounds are kept: with one more, every second of them is removed, and from then on
the distance between two is twice as large. The file so has the whole of a run, however long.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import orjson

from dlmctl.records.files import append_line, write_file
from dlmctl.records.jsonl import Record, dump
from dlmctl.train.run_directory import SAMPLES

MOST = 32


class KeptSamples:
    """The file of a run, which the first rank writes."""

    def __init__(self, directory: Path, every: int, count: int) -> None:
        """Args:
        every: rounds from one that is kept to the next; without rounds, steps.
        count: completions of each.
        """
        self._path, self._every, self._count = directory / SAMPLES, every, count
        self._kept = sorted({_number(line) for line in self._lines()})
        if len(self._kept) > 1:  # a run that resumes has the distance that it had
            self._every = max(every, min(b - a for a, b in pairwise(self._kept)))

    def offer(self, groups: Sequence[Sequence[Record]], step: int, round: int | None) -> None:
        """Keep the first completions of a batch if it is its turn, of as many prompts as it has.

        Args:
            step: that was taken on the batch.
            round: of the training loop; None if there is none.
        """
        number = step if round is None else round
        if number % self._every or number in self._kept:
            return
        place = {"step": step} if round is None else {"step": step, "round": round}
        rows = [row for samples in _turns(groups) for row in samples][: self._count]
        append_line(self._path, b"".join(dump({**place, **row}) for row in rows))
        self._kept.append(number)
        while len(self._kept) > MOST:
            self._every *= 2
            self._kept = [n for n in self._kept if n % self._every == 0]
            left = set(self._kept)
            write_file(self._path, b"".join(x for x in self._lines() if _number(x) in left))

    def _lines(self) -> list[bytes]:
        return self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []


def _turns(groups: Sequence[Sequence[Record]]) -> Iterable[list[Record]]:
    """The first sample of every group, then the second, and so on."""
    for turn in range(max(map(len, groups), default=0)):
        yield [group[turn] for group in groups if turn < len(group)]


def _number(line: bytes) -> int:
    record = orjson.loads(line)
    return int(record.get("round", record["step"]))
