r"""Verifier `vqa`: short answers about images, compared as evaluations of visual questions do.

Case, articles, punctuation and number words do not matter, numbers are compared by value, of a
choice the letter is enough, and LaTeX is left to the verifier `math` where its package is
installed. Of several references, in `answers`, any will do; of ten, as VQAv2 has from ten people,

    min(1, matches / 3)                                   (Antol et al. 2015, arXiv 1505.00468)
"""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.tasks.boxes import last_boxed
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, required
from dlmctl.verifiers.mathematics import TIME_LIMIT, judge, math
from dlmctl.verifiers.typography import plain

PEOPLE = 10
"""So many references are those of VQAv2."""
LONGEST_LATEX = 200
"""Characters of an answer that may be LaTeX; what is longer is prose."""
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen", "twenty"),
)
_DIGITS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_CHOICE = re.compile(r"\(?([A-Z])\)?(?:[.:)].*)?", re.DOTALL)
_UNIT = re.compile(r"\s*(?:\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree|°|\\?%)$")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:\s*/\s*\d+)?")
_LATEX = re.compile(r"[\\^√π]")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def vqa(record: Mapping[str, Any], time_limit: float = TIME_LIMIT) -> Verdict:
    """1 if the answer matches a reference; a share of people where there are ten.

    Args:
        time_limit: seconds, for all references together; what is not compared does not match.

    Raises:
        DataError: the record has neither `answer` nor `answers`.
    """
    wanted = references(record)
    text, place = answer_text(completion_text(record))
    if any(_may_be_latex(text, each) for each in wanted):
        judge()  # its start does not count
    end = time.monotonic() + time_limit
    if len(wanted) == PEOPLE:
        reward = min(1.0, sum(matches(text, each, end) for each in wanted) / 3)
    else:
        reward = float(any(matches(text, each, end) for each in wanted))
    detail = {"correct": reward == 1.0, "found_in": place, "extracted": text[:LONGEST_LATEX]}
    if reward < 1.0:
        detail["why"] = f"wanted {' or '.join(dict.fromkeys(wanted))}"
        if time.monotonic() >= end:
            detail["why"] = f"took longer than {time_limit:g} s"
    return Verdict(reward, detail)


def references(record: Mapping[str, Any]) -> list[str]:
    """Right answers: of `answers`, texts or objects with `answer`, else `answer`."""
    held = record.get("answers")
    held = required(record, "answer") if held is None else held
    listed = held if isinstance(held, list) else [held]
    found = [each.get("answer") if isinstance(each, Mapping) else each for each in listed]
    if not found or not all(isinstance(each, (str, int, float)) for each in found):
        raise DataError(f"answers {str(held)[:80]} are neither texts nor numbers")
    return [_bare(str(each)) for each in found]


def matches(given: str, wanted: str, end: float | None = None) -> bool:
    """Whether an answer says the same as a reference.

    Args:
        end: time.monotonic() at which a comparison of LaTeX is given up.
    """
    if not given:
        return False
    if given.lower() == wanted.lower():
        return True
    words = normalised(wanted)
    if words and normalised(given) == words:
        return True
    value = number(wanted)
    if value is not None and number(given) == value:
        return True
    if re.fullmatch("[A-Z]", wanted):
        chosen = _CHOICE.fullmatch(plain(given))
        return chosen is not None and chosen[1] == wanted
    left = TIME_LIMIT if end is None else end - time.monotonic()
    return left > 0 and _equal_latex(given, wanted, left)


def normalised(text: str) -> str:
    """Lower case, without articles and punctuation, number words as digits.

    Signs of arithmetic stay, and brackets beside digits. An article stays where nothing else is
    there, since it may name a choice.
    """
    text = _TEXT.sub(r"\1", plain(text).lower())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['’]", "", text)
    text = re.sub(r"\.(?!\d)|[,;!?\"]|(?<=[a-z]{2})-(?=[a-z]{2})", " ", text)
    if not re.search(r"\d", text):
        text = re.sub(r"[()\[\]{}:]", " ", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def number(text: str) -> Fraction | None:
    """The value of an answer that is a number and nothing else but a sign of currency or unit."""
    text = plain(text).strip()
    if len(text) > LONGEST_LATEX:
        return None
    text = re.sub(r"^-[$€£¥]", "-", text).strip("$€£¥").strip()
    text = _UNIT.sub("", text.rstrip("."))
    text = _DIGITS.get(text.lower(), text)
    if not re.search(r"\d", text) or not _NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.replace(",", "").replace(" ", "").partition("/")
    if top.strip() in ("", "-") or (bottom and int(bottom) == 0):
        return None
    return Fraction(top) / Fraction(bottom or 1)


def _bare(text: str) -> str:
    """A reference without the box that some data sets put it in."""
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


def _equal_latex(given: str, wanted: str, time_limit: float) -> bool:
    """Whether the package says so; it is not asked where a reference is words alone."""
    if not _may_be_latex(given, wanted):
        return False
    verdict = math({"answer": wanted, "completion": f"\\boxed{{{given}}}"}, time_limit)
    return verdict.reward == 1.0


def _may_be_latex(given: str, wanted: str) -> bool:
    if len(given) > LONGEST_LATEX or "\\boxed" in given:
        return False
    latex = _LATEX.search(wanted) or (_LATEX.search(given) and number(wanted) is not None)
    return bool(latex) and _has_math()


@cache
def _has_math() -> bool:
    return importlib.util.find_spec("math_verify") is not None
