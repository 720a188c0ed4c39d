"""Which tokens of a response perceive and which reason.

Roles go by the characters that tokens spell, not by the ids of the tags: a tokenizer may join ">"
with what follows it. A token has a role only if it lies wholly within the span.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from dlmctl.settings.layout import Tags
from dlmctl.tasks.layout import Span, layout

OTHER, PERCEPTION, REASONING = 0, 1, 2


def token_roles(texts: Sequence[str], tags: Tags) -> list[int] | None:
    """The role of each token; None if the response is malformed.

    Args:
        texts: what each token spells; together they are the response.
    """
    parts = layout("".join(texts), tags)
    if parts is None:
        return None
    ends = list(accumulate(len(text) for text in texts))
    spans = [(end - len(text), end) for text, end in zip(texts, ends, strict=True)]
    roles = [
        PERCEPTION if _within(span, parts.perception)
        else REASONING if _within(span, parts.reasoning)
        else OTHER
        for span in spans
    ]  # fmt: skip
    return roles if PERCEPTION in roles and REASONING in roles else None


def _within(span: Span, whole: Span) -> bool:
    # The first bytes of a divided character decode to no text; they are at the position reached.
    return whole[0] <= span[0] < whole[1] and span[1] <= whole[1]
