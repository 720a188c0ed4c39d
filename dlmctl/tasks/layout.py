r"""The layout of a response that first says what it sees and then reasons, that of Vision-SR1
(arXiv 2508.19652):

    <description> perception </description> <think> reasoning </think> \boxed{answer}

Tags are found as characters, so that it does not matter how a tokenizer divides them.
"""

from __future__ import annotations

from typing import NamedTuple

from dlmctl.settings.layout import Tags
from dlmctl.tasks.boxes import last_box

Span = tuple[int, int]
"""First character, and the one behind the last."""


class Layout(NamedTuple):
    """Where the parts of a response are in its text."""

    perception: Span
    """Between its tags, with the white space at the ends."""
    reasoning: Span
    answer: Span
    r"""The last \boxed{...} behind the reasoning, from backslash to brace."""
    alone: bool
    """Whether there is only white space outside of tags, parts and answer."""


class _Block(NamedTuple):
    start: int
    inner: Span
    end: int


def layout(text: str, tags: Tags = Tags()) -> Layout | None:
    """The parts of a response; None if it is malformed.

    It is malformed if a tag is missing, repeated or out of order, if a part is blank, or if no box
    with content follows. Takes time linear in the length of the text.
    """
    first, second = _block(text, tags.perception), _block(text, tags.reasoning)
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


def _block(text: str, tag: str) -> _Block | None:
    """The block between the tags; None unless there is one, and it is not blank."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    start, close = text.index(opening), text.index(closing)
    inner = start + len(opening)
    if not text[inner:close].strip():  # as if the tags are out of order
        return None
    return _Block(start, (inner, close), close + len(closing))
