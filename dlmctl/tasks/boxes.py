r"""The last \boxed{...} or \fbox{...} of a text, with balanced braces, in one pass."""

from __future__ import annotations

import re
from typing import NamedTuple

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")


class Box(NamedTuple):
    """A box and its content."""

    start: int
    """Of the backslash."""
    end: int
    """Behind the closing brace."""
    inner: str


def last_box(text: str, start: int = 0) -> Box | None:
    """The closed box that begins last, from `start` on; None without one."""
    opened: list[tuple[int, int, bool]] = []  # start, end of the opening, whether a box's
    last: tuple[int, int, int] | None = None
    for brace in _BRACE.finditer(text, start):
        if brace.group() != "}":
            opened.append((brace.start(), brace.end(), brace.group() != "{"))
        elif opened:
            begin, inner, boxed = opened.pop()
            if boxed and (last is None or begin > last[0]):
                last = begin, inner, brace.start()
    if last is None:
        return None
    begin, inner, close = last
    return Box(begin, close + 1, text[inner:close])


def last_boxed(text: str) -> str | None:
    """Content of the last box of a text; None without one."""
    box = last_box(text)
    return None if box is None else box.inner
