r"""Verifier `vqa`: short answers about images, compared as evaluations of visual questions do.

Case, articles, punctuation and number words do not matter; numbers are compared by value; for a
choice the letter is enough; LaTeX is left to the verifier `math` if its package is installed. One
match among several references in `answers` is enough; ten references are from ten people, as in
VQAv2, and give

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
from dlmctl.verifiers.numeric import fraction
from dlmctl.verifiers.typography import plain

PEOPLE = 10
"""Number of references in VQAv2."""
LONGEST_LATEX = 200
"""Most characters of an answer in LaTeX; a longer one is prose."""
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
    """1 if the answer matches a reference; min(1, matches / 3) if there are ten.

    Args:
        time_limit: seconds for all references together; those that are left do not match.

    Raises:
        DataError: the record has neither `answer` nor `answers`.
    """
    wanted = references(record)
    text, place = answer_text(completion_text(record))
    if any(_may_be_latex(text, each) for each in wanted):
        judge()  # starting it does not count
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
    """Right answers: those of `answers`, texts or objects with `answer`, else `answer`."""
    value = record.get("answers")
    value = required(record, "answer") if value is None else value
    listed = value if isinstance(value, list) else [value]
    answers = [each.get("answer") if isinstance(each, Mapping) else each for each in listed]
    if not answers or not all(isinstance(each, (str, int, float)) for each in answers):
        raise DataError(f"answers {str(value)[:80]} are neither texts nor numbers")
    boxed = [last_boxed(str(each)) for each in answers]  # some data sets put references in a box
    return [
        (str(each) if box is None else box).strip()
        for each, box in zip(answers, boxed, strict=True)
    ]


def matches(answer: str, wanted: str, end: float | None = None) -> bool:
    """Whether an answer equals a reference.

    Args:
        end: time.monotonic() at which a comparison of LaTeX is abandoned.
    """
    if not answer:
        return False
    if answer.lower() == wanted.lower():
        return True
    words = normalised(wanted)
    if words and normalised(answer) == words:
        return True
    value = number(wanted)
    if value is not None and number(answer) == value:
        return True
    if re.fullmatch("[A-Z]", wanted):
        chosen = _CHOICE.fullmatch(plain(answer))
        return chosen is not None and chosen[1] == wanted
    left = TIME_LIMIT if end is None else end - time.monotonic()
    if left <= 0 or not _may_be_latex(answer, wanted):
        return False
    return math({"answer": wanted, "completion": f"\\boxed{{{answer}}}"}, left).reward == 1.0


def normalised(text: str) -> str:
    """Lower case, without articles and punctuation, with number words as digits.

    Signs of arithmetic stay, and brackets in a text with digits. An article stays if there is
    nothing else, since it may name a choice.
    """
    text = _TEXT.sub(r"\1", plain(text).lower())
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['’]", "", text)
    text = re.sub(r"\.(?!\d)|[,;!?\"]|(?<=[a-z]{2})-(?=[a-z]{2})", " ", text)
    if not re.search(r"\d", text):
        text = re.sub(r"[()\[\]{}:]", " ", text)
    words = [_DIGITS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in _ARTICLES] or words)


def number(text: str) -> Fraction | None:
    """The value of an answer that is a number, perhaps with a currency sign or unit; else None."""
    text = plain(text).strip()
    if len(text) > LONGEST_LATEX:
        return None
    text = re.sub(r"^-[$€£¥]", "-", text).strip("$€£¥").strip()
    text = _UNIT.sub("", text.rstrip("."))
    text = _DIGITS.get(text.lower(), text)
    if not re.search(r"\d", text) or not _NUMBER.fullmatch(text):
        return None
    return fraction(text)


def _may_be_latex(answer: str, wanted: str) -> bool:
    """Whether the package is worth asking: not if the reference is plain words."""
    if len(answer) > LONGEST_LATEX or "\\boxed" in answer:
        return False
    latex = _LATEX.search(wanted) or (_LATEX.search(answer) and number(wanted) is not None)
    return bool(latex) and _has_math()


@cache
def _has_math() -> bool:
    return importlib.util.find_spec("math_verify") is not None
