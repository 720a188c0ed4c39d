r"""The last \boxed{...} or \fbox{...} of a text, braces balanced, in one pass."""

from __future__ import annotations

import re
from typing import NamedTuple

_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|[{}]")


class Box(NamedTuple):
    """Where a box stands, and what it holds."""

    start: int
    """At the backslash."""
    end: int
    """Behind the closing brace."""
    inner: str


def last_box(text: str, start: int = 0) -> Box | None:
    """The box that begins last of those that are closed; None without one.

    Args:
        start: where to begin to look.
    """
    opened: list[tuple[int, int, bool]] = []  # start, end of the opening, whether a box's
    last: tuple[int, int, int] | None = None
    for found in _BRACE.finditer(text, start):
        if found.group() != "}":
            opened.append((found.start(), found.end(), found.group() != "{"))
        elif opened:
            begin, inner, boxed = opened.pop()
            if boxed and (last is None or begin > last[0]):
                last = begin, inner, found.start()
    if last is None:
        return None
    begin, inner, close = last
    return Box(begin, close + 1, text[inner:close])


def last_boxed(text: str) -> str | None:
    """What the last box of a text holds; None without one."""
    box = last_box(text)
    return None if box is None else box.inner
