"""Curves drawn with characters: two by four dots of Braille in each, or an asterisk."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of each dot of a character, by row and column (Unicode, Braille Patterns)."""
BLANK = 0x2800

Points = Sequence[tuple[float, float]]
"""x and y, by growing x."""


def spread(points: Points, low: float, high: float, columns: int) -> list[float | None]:
    """A value of y for each column from x = low to high: the mean of the points in it.

    Between two columns with points values lie on a line; before the first and behind the last
    there are none.
    """
    sums, counts = [0.0] * columns, [0] * columns
    for x, y in points:
        at = 0 if high <= low else round((x - low) / (high - low) * (columns - 1))
        if isfinite(y) and 0 <= at < columns:
            sums[at] += y
            counts[at] += 1
    values: list[float | None] = [
        total / count if count else None for total, count in zip(sums, counts, strict=True)
    ]
    known = [at for at, value in enumerate(values) if value is not None]
    for left, right in pairwise(known):
        first, last = values[left], values[right]
        assert first is not None
        assert last is not None
        for at in range(left + 1, right):
            values[at] = first + (last - first) * (at - left) / (right - left)
    return values


def drawn(
    series: Sequence[Points], width: int, height: int, braille: bool = True
) -> list[list[tuple[str, int]]]:
    """Lines of a picture: of each character its text, and the number of its series (-1: none).

    All series have the same axes, from the smallest to the largest number of any.

    Args:
        width, height: characters.
    """
    wide, high = (2 * width, 4 * height) if braille else (width, height)
    xs = [x for points in series for x, _ in points]
    cells = [[(BLANK if braille else 0, -1) for _ in range(width)] for _ in range(height)]
    spreads = [spread(points, min(xs), max(xs), wide) for points in series] if xs else []
    ys = [y for values in spreads for y in values if y is not None]
    low, high_y = (min(ys), max(ys)) if ys else (0.0, 0.0)
    for number, values in enumerate(spreads):
        before: int | None = None
        for x, value in enumerate(values):
            if value is None:
                before = None
                continue
            part = (value - low) / (high_y - low) if high_y > low else 0.5
            row = round((1 - part) * (high - 1))
            start = row if before is None else before + (row > before) - (row < before)
            for y in range(min(start, row), max(start, row) + 1):
                across, down = (x // 2, y // 4) if braille else (x, y)
                bits = DOTS[y % 4][x % 2] if braille else 1
                cells[down][across] = cells[down][across][0] | bits, number
            before = row
    return [
        [(chr(bits) if braille else "*" if bits else " ", number) for bits, number in row]
        for row in cells
    ]
