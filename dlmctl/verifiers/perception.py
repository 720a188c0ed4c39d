"""Verifiers of a response that describes what it sees: its layout, and the description itself.

    layout      1 if the completion is description, thought and box, and nothing else
    grounding   F1 of the multiset of described things against `scene`

Neither says whether the answer is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.tasks import layout as layouts
from dlmctl.tasks.layout import TAGS, Tags
from dlmctl.tasks.scenes import Thing, described
from dlmctl.verifiers.answer import Verdict, completion_text, required


def layout(record: Mapping[str, Any], tags: Tags = TAGS) -> Verdict:
    """1 if the whole completion is of the layout with these tags."""
    found = layouts.layout(completion_text(record), tags.perception, tags.reasoning)
    if found is not None and found.alone:
        return Verdict(1.0, {})
    what = f"<{tags.perception}>, <{tags.reasoning}> and a box"
    why = f"text outside of {what}" if found else f"not {what}, once each and in this order"
    return Verdict(0.0, {"why": why})


def grounding(record: Mapping[str, Any], tags: Tags = TAGS) -> Verdict:
    """F1 of the things that the description names, each by colour, shape, row and column.

    The description is read wherever its tags are, the rest of the layout does not matter; what
    is not in the grammar of `tasks.scenes` counts as a thing that is not there.

    Raises:
        DataError: `scene` is missing, or is none.
    """
    truth = Counter(_things(required(record, "scene")))
    text = completion_text(record)
    _, opened, rest = text.partition(f"<{tags.perception}>")
    inner, closed, _ = rest.partition(f"</{tags.perception}>")
    if not (opened and closed and inner.strip()):
        nothing = {"precision": 0.0, "recall": 0.0, "exact": False}
        return Verdict(0.0, {**nothing, "why": f"no <{tags.perception}>"})
    named = Counter(described(inner))
    right = (named & truth).total()
    detail = {
        "precision": right / named.total(),
        "recall": right / truth.total(),
        "exact": named == truth,
    }
    return Verdict(2 * right / (named.total() + truth.total()), detail)


def _things(scene: Any) -> list[Thing | None]:
    try:
        things: list[Thing | None] = [Thing(**thing) for thing in scene]
        hash(tuple(things))  # a list for a colour has none
    except TypeError:
        raise DataError("field 'scene' is not a list of colour, shape, row and column") from None
    if not things:
        raise DataError("field 'scene' is empty")
    return things
