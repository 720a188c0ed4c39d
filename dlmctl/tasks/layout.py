r"""The layout of a response that first says what it sees and then thinks, that of Vision-SR1
(arXiv 2508.19652):

    <description> perception </description> <think> reasoning </think> \boxed{answer}

Tags are looked for as characters, so that it does not matter how a tokenizer divides them; any
other names for the two can be given.
"""

from __future__ import annotations

from typing import NamedTuple

from dlmctl.settings.layout import Tags
from dlmctl.tasks.boxes import last_box

Span = tuple[int, int]
"""First character, and the one behind the last."""


TAGS = Tags()


class Layout(NamedTuple):
    """Where the parts of a response stand in its text."""

    perception: Span
    """Between its tags, white space at the ends included."""
    reasoning: Span
    answer: Span
    r"""The last \boxed{...} behind the reasoning, from backslash to brace."""
    alone: bool
    """Whether nothing but white space stands outside of tags, parts and answer."""


def layout(
    text: str, perception: str = TAGS.perception, reasoning: str = TAGS.reasoning
) -> Layout | None:
    """The parts of a response; None where it is malformed.

    It is so where a tag is missing, stands there twice or out of order, where a part is blank, or
    where no box that holds something comes behind. Time is linear in the length of the text.
    """
    first = _block(text, perception)
    second = _block(text, reasoning)
    if first is None or second is None or first.end > second.start:
        return None
    box = last_box(text, second.end)
    if box is None or not box.inner.strip():
        return None
    outside = (
        text[: first.start],
        text[first.end : second.start],
        text[second.end : box.start],
        text[box.end :],
    )
    alone = not any(part.strip() for part in outside)
    return Layout(first.inner, second.inner, (box.start, box.end), alone)


class _Block(NamedTuple):
    start: int
    inner: Span
    end: int


def _block(text: str, tag: str) -> _Block | None:
    """The one block of a tag, which holds something."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, close = text.index(opening), text.index(closing)
    inner = start + len(opening)
    if not text[inner:close].strip():  # also where they are out of order
        return None
    return _Block(start, (inner, close), close + len(closing))
