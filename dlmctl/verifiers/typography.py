"""Numbers and expressions in the characters of a keyboard, however they were typeset."""

from __future__ import annotations

import re

DASHES = "‒–—―"
"""Figure dash, en dash, em dash and horizontal bar: minus in some places, punctuation in others."""
SIGNS = {
    "-": "‐‑−﹣➖",
    "+": "﹢➕",
    "*": "×·∙⋅∗✕✖",
    "/": "÷∕⁄➗",
    "": "\u200b\u2060\ufeff",  # no width
}
PLAIN = {ord(sign): plain for plain, signs in SIGNS.items() for sign in signs} | {
    full_width: full_width - 0xFEE0 for full_width in range(0xFF01, 0xFF5F)
}
SPACES = {ord(space): " " for space in "\u00a0\u2007\u2008\u2009\u200a\u202f\u205f\u3000"}

_DIGIT = re.compile(r"(?![0-9])\d")
_SPACE_IN_NUMBER = r"(?:[\u00a0\u2007\u2009\u202f]|\\[,:;! ]|\{,\})"
_THOUSANDS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_SPACE_IN_NUMBER}\d{{3}})+(?!\d)")
_MINUS = re.compile(
    # A sign: before a number, and behind nothing that it could be subtracted from or belong to.
    rf"(?<![\w)\]}}])[{DASHES}](?=[\d.($€£¥\\])"
    # Between two numbers.
    rf"|(?<=[\d)\]}}])\s*[{DASHES}](?=\s*[\d.($€£¥\\])"
)


def plain(text: str) -> str:
    r"""The text with the keyboard's characters for typographic signs, digits and spaces.

    A dash becomes a minus only where one can stand. Thousands separated by a no-break or thin
    space, or in LaTeX (`1\,234`), are joined, and `\$` and `\%` lose the backslash. Takes time
    linear in the length of the text.
    """
    if "\\" not in text and "{" not in text and text.isascii():
        return text
    text = _DIGIT.sub(lambda digit: str(int(digit.group())), text.translate(PLAIN))
    text = text.replace("\\$", "$").replace("\\%", "%")
    text = _THOUSANDS.sub(lambda number: re.sub(_SPACE_IN_NUMBER, "", number.group()), text)
    return _MINUS.sub("-", text.translate(SPACES))
