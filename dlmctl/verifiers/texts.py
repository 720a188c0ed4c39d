"""Verifiers of plain text: format tags, multiple choice, exact match."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.typography import plain

BETWEEN = re.compile(r"</reasoning>\s*<answer>")
"""The text between a reasoning block and an answer block. A pattern of both whole blocks would scan
the text once for every tag in it."""
LETTER = r"\(?([A-Z])\)?"
CHOICES = [
    re.compile(rf"^{LETTER}(?:[.:)\s]|$)"),
    re.compile(rf"(?i:answer|choice|option)\s*(?:(?i:is|:)\s*)?\**{LETTER}(?![A-Za-z])"),
    re.compile(rf"(?<![A-Za-z]){LETTER}(?![A-Za-z'])"),
]


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


def choice(record: Mapping[str, Any]) -> Verdict:
    """1 if the letter that the answer names is the one of `answer`."""
    wanted = str(required(record, "answer")).strip().strip("()").upper()
    text, _ = answer_text(completion_text(record))
    text = plain(text).strip()
    letters = next(filter(None, (pattern.findall(text) for pattern in CHOICES)), [None])
    return judged(letters[-1] == wanted, choice=letters[-1])


def exact(record: Mapping[str, Any]) -> Verdict:
    """1 if the answer equals `answer`, except for white space at the ends."""
    text, place = answer_text(completion_text(record))
    return judged(text == str(required(record, "answer")).strip(), found_in=place)
