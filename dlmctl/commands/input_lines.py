"""Number of lines of a command's input, if it is cheap to know.

Files are counted on demand; for large files, the beginning is counted and the rest estimated from
the size. The length of a pipe is unknown.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

COUNTED = 64 * 2**20
"""Most bytes of a file in which lines are counted."""
BLOCK = 2**20


@dataclass
class Lines:
    """The number of lines of an input, times a factor, and at most some number."""

    places: Sequence[tuple[str, int]] | None
    """Names and offsets to begin at; `-` is standard input; None if the length is unknown."""
    factor: float = 1.0
    most: int | None = None
    """Also the estimate if the length is unknown."""
    _counted: list[tuple[int, bool] | None] = field(default_factory=list)

    def times(self, factor: float, most: int | None = None) -> Lines:
        """`factor` for each line, and at most `most` in all."""
        return replace(self, factor=self.factor * factor, most=most, _counted=[])

    def count(self) -> tuple[int, bool] | None:
        """The number, rounded up, and whether it is exact; None if it is unknown."""
        if not self._counted:
            self._counted.append(self._count())
        return self._counted[0]

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
    """Lines of these files; none, or `-`, is standard input. Call it before that is read."""
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
    """Lines of a file from an offset on, and whether all of them were counted."""
    number = os.dup(sys.stdin.fileno()) if name == "-" else os.open(name, os.O_RDONLY)
    try:
        size, at, lines, last = os.fstat(number).st_size - begin, 0, 0, b"\n"
        while at < COUNTED and (block := os.pread(number, BLOCK, begin + at)):
            at, lines, last = at + len(block), lines + block.count(b"\n"), block[-1:]
    finally:
        os.close(number)
    if at < size:
        return round(lines * size / at), False
    return lines + (last != b"\n"), True
