"""Verifier `gsm8k`: one number, compared exactly.

It reads thousands separators, currency and percent signs, units, LaTeX and fractions; `120.0` is
120. The number is the one in the answer tags or the box, else the one after `####`, else the last
one of the text. Takes time linear in the length of the text.
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
"""A minus with nothing before it: 10-5 has no -5."""
NUMBER = re.compile(
    SIGN + r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s*/\s*\d+(?![\d/]))?|\.\d+)"
)
# For texts without two spaces in a row: several \s* would try every split of a long run.
FRACTION = re.compile(r"\\[dt]?frac ?\{? ?(\d+) ?\}? ?\{? ?(\d+) ?\}?")
MIXED = re.compile(rf"(?<!\d)({SIGN})(\d+) ?\\[dt]?frac ?\{{ ?(\d+) ?\}} ?\{{ ?(\d+) ?\}}")
LONGEST = 300
"""Most characters of a number; a longer one is no answer, and has no floating-point value."""


def gsm8k(record: Mapping[str, Any]) -> Verdict:
    """1 if the final number of the completion equals `answer`."""
    wanted = parse_number(str(required(record, "answer")))
    if wanted is None:
        raise DataError(f"answer {record['answer']!r} has no number")
    text, place = answer_text(completion_text(record))
    if place == "text" and "####" in text:
        text, place = text.rpartition("####")[2], "####"
    value = parse_number(text)
    if value is None:
        return judged(False, "no number found", number=None, found_in=place)
    shown = str(value) if value.denominator == 1 else f"{float(value):g}"
    why = "" if value == wanted else f"found {shown}, wanted {record['answer']}"
    return judged(value == wanted, why, number=shown, found_in=place)


def parse_number(text: str) -> Fraction | None:
    """The number in a short text: the one after the last equals sign, else the last one."""
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
    numbers = NUMBER.findall(text)
    if not numbers or len(numbers[-1]) > LONGEST:
        return None
    return fraction(numbers[-1])


def fraction(text: str) -> Fraction | None:
    """The value of a number such as -1,234.5 or 3 / 4; None if it has no value."""
    top, _, bottom = text.replace(",", "").replace(" ", "").partition("/")
    if top.strip() in ("", "-") or (bottom and int(bottom) == 0):
        return None
    return Fraction(top) / Fraction(bottom or 1)
