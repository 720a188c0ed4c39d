"""How many lines the input of a command has, where that is cheap to know.

Files are counted, when somebody asks; of large ones the beginning, and the rest is estimated by
their size. A pipe does not tell.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

COUNTED = 64 * 2**20
"""Bytes of a file whose lines are counted."""
BLOCK = 2**20


@dataclass
class Lines:
    """The number of lines of an input, times a factor, but no more than some number."""

    places: Sequence[tuple[str, int]] | None
    """Names and where to begin in them; `-` is standard input; None: it cannot be told."""
    factor: float = 1.0
    most: int | None = None
    """Which it is taken for where the input does not tell."""
    _found: list[tuple[int, bool] | None] = field(default_factory=list)

    def times(self, factor: float, most: int | None = None) -> Lines:
        """So many for each line, and at most so many in all."""
        return replace(self, factor=self.factor * factor, most=most, _found=[])

    def count(self) -> tuple[int, bool] | None:
        """The number, rounded up, and whether it is exact; None where it cannot be told."""
        if not self._found:
            self._found.append(self._count())
        return self._found[0]

    def _count(self) -> tuple[int, bool] | None:
        unknown = None if self.most is None else (self.most, True)
        lines, exact = 0, True
        for name, begin in self.places or ():
            try:
                some, whole = _lines(name, begin)
            except OSError:
                return unknown
            lines, exact = lines + some, exact and whole
        if self.places is None:
            return unknown
        number = -int(-lines * self.factor // 1)
        return (number, exact) if self.most is None else (min(number, self.most), exact)


def input_lines(files: Sequence[str] | None) -> Lines:
    """Of these files, none or `-` being standard input; to be called before that is read."""
    places = []
    for name in files or ["-"]:
        try:
            number = sys.stdin.fileno() if name == "-" else None
            mode = os.stat(name if number is None else number).st_mode
            begin = 0 if number is None else os.lseek(number, 0, os.SEEK_CUR)
        except (OSError, ValueError, AttributeError):
            return Lines(None)
        if not stat.S_ISREG(mode):
            return Lines(None)
        places.append((name, begin))
    return Lines(places)


def _lines(name: str, begin: int) -> tuple[int, bool]:
    """Lines of a file from a place on, and whether all of them were counted."""
    number = os.dup(sys.stdin.fileno()) if name == "-" else os.open(name, os.O_RDONLY)
    try:
        size, at, found, last = os.fstat(number).st_size - begin, 0, 0, b"\n"
        while at < COUNTED and (block := os.pread(number, BLOCK, begin + at)):
            at, found, last = at + len(block), found + block.count(b"\n"), block[-1:]
    finally:
        os.close(number)
    if at < size:
        return round(found * size / at), False
    return found + (last != b"\n"), True
