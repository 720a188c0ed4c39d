"""Verifiers of plain text: format tags, exact match."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required

BETWEEN = re.compile(r"</reasoning>\s*<answer>")
"""The text between a reasoning block and an answer block. A pattern of both whole blocks would scan
the text once for every tag in it."""


def tags(record: Mapping[str, Any]) -> Verdict:
    """1 if the completion is one reasoning block and one answer block and nothing else."""
    text = completion_text(record).strip()
    middle = BETWEEN.search(text, len("<reasoning>") + 1)
    whole = (
        middle is not None
        and text.startswith("<reasoning>")
        and text.endswith("</answer>")
        and middle.end() < len(text) - len("</answer>")
    )
    once = all(text.count(tag) == 1 for tag in ("<reasoning>", "<answer>"))
    return judged(whole and once, "" if whole and once else "not one block of each tag")


def exact(record: Mapping[str, Any]) -> Verdict:
    """1 if the answer equals `answer`, except for white space at the ends."""
    text, place = answer_text(completion_text(record))
    return judged(text == str(required(record, "answer")).strip(), found_in=place)
