"""Verifier `gsm8k`: one number, compared exactly.

Thousands separators, currency and percent signs, units, LaTeX and fractions are read; `120.0` is
120. The number is looked for in the answer tags or the box, then after `####`, then it is the last
one of the text. Time is linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.typography import plain

SIGN = r"(?:(?<![\w)])-)?"
"""A minus that nothing stands before: 10-5 is no -5."""
NUMBER = re.compile(
    SIGN + r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d/]))?|\.\d+)"
)
# For texts without two spaces in a row: several \s* would try every way to share a long run.
FRACTION = re.compile(r"\\[dt]?frac ?\{? ?(\d+) ?\}? ?\{? ?(\d+) ?\}?")
MIXED = re.compile(rf"(?<!\d)({SIGN})(\d+) ?\\[dt]?frac ?\{{ ?(\d+) ?\}} ?\{{ ?(\d+) ?\}}")
LONGEST = 300
"""Characters of a number; a longer one is no answer, and has no floating-point value."""


def gsm8k(record: Mapping[str, Any]) -> Verdict:
    """1 if the number that the completion ends on equals `answer`."""
    wanted = parse_number(str(required(record, "answer")))
    if wanted is None:
        raise DataError(f"answer {record['answer']!r} holds no number")
    text, place = answer_text(completion_text(record))
    if place == "text" and "####" in text:
        text, place = text.rpartition("####")[2], "####"
    given = parse_number(text)
    if given is None:
        return judged(False, "no number found", number=None, found_in=place)
    shown = str(given) if given.denominator == 1 else f"{float(given):g}"
    why = "" if given == wanted else f"found {shown}, wanted {record['answer']}"
    return judged(given == wanted, why, number=shown, found_in=place)


def parse_number(text: str) -> Fraction | None:
    """The number that a short text states: after the last equals sign, else the last one in it."""
    text = re.sub(r"\\[,!;:]|\\text\s*\{[^{}]*\}|[$€£¥%]", "", plain(text))
    text = re.sub(r"\s+", " ", text)
    before, _, after = text.rpartition("=")
    text = after if before and re.search(r"\d", after) else text
    if mixed := MIXED.search(text):
        if len(mixed.group()) > LONGEST:
            return None
        whole, top, bottom = map(int, mixed.groups()[1:])
        if bottom == 0:
            return None
        value = whole + Fraction(top, bottom)
        return -value if mixed[1] else value
    text = FRACTION.sub(r"\1/\2", text)
    found = NUMBER.findall(text)
    if not found or len(found[-1]) > LONGEST:
        return None
    top, _, bottom = found[-1].replace(",", "").replace(" ", "").partition("/")
    if bottom and int(bottom) == 0:
        return None
    return Fraction(top) / Fraction(bottom or 1)
