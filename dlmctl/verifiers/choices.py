r"""Verifier `choice`: which of several choices an answer names, by its letter or by its text.

    answer     the right choice: its letter, its index from 0 (a number), or its text
    choices    the texts, a list, or {"text": [...], "label": [...]} as in ARC; optional

The answer is looked for in the last <answer>, in \boxed{}, and else in the whole text, in this
order: a choice as the whole answer; the last statement ("the answer is (B)", "Answer: B"); a letter
that begins a line alone ("B. Paris"); the last statement of another kind ("option B"); the last
letter that stands alone. The published evaluations take the first statement, we take the last
(ours): a model that corrects itself means what it says at the end.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.typography import plain

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MOST_CHOICES = len(LETTERS)
LONGEST_CHOICE = 500
"""Most characters after a statement that are compared with the texts of the choices."""
_WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit|boxed|fbox)\s{0,3}(?=\{)|[*_`${}]")
"""Marks around a letter in Markdown and LaTeX."""
_STATES = re.compile(r"(?i)answer\s{0,3}(?:is|:)\s{0,3}:?")
_AROUND = " \t\r\n.,;:!\"'"


class Choices(NamedTuple):
    """The choices of a record."""

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    """Normalised; empty if the record has none."""


class _Patterns(NamedTuple):
    whole: re.Pattern[str]
    statement: re.Pattern[str]
    begins: re.Pattern[str]
    other: re.Pattern[str]
    alone: re.Pattern[str]


def choice(record: Mapping[str, Any]) -> Verdict:
    """1 if the choice that the completion names is that of `answer`.

    Raises:
        DataError: `answer` is none of the choices, or `choices` has another form.
    """
    choices = choices_of(record)
    wanted = wanted_label(required(record, "answer"), choices)
    text, place = answer_text(completion_text(record))
    chosen = named_choice(text, choices, place != "text")
    why = "" if chosen else "no choice is named"
    return judged(chosen == wanted, why, choice=chosen, found_in=place)


def choices_of(record: Mapping[str, Any]) -> Choices:
    """Labels and texts of a record; the letters A to Z without `choices`; raises DataError."""
    value = record.get("choices")
    if value is None:
        return Choices(tuple(LETTERS), ())
    texts, labels = value, None
    if isinstance(value, Mapping):
        texts, labels = value.get("text"), value.get("label")
    if not _are_texts(texts) or not 2 <= len(texts) <= MOST_CHOICES:
        raise DataError(f"field 'choices' is not a list of 2 to {MOST_CHOICES} texts")
    if labels is None:
        labels = list(LETTERS[: len(texts)])
    shown = [str(label).strip().upper() for label in labels] if _are_texts(labels) else []
    if len(shown) != len(texts) or len({*shown}) < len(shown) or not all(map(_is_label, shown)):
        raise DataError("labels of 'choices' are not different letters or digits, one for a text")
    return Choices(tuple(shown), tuple(normalised(str(text)) for text in texts))


def wanted_label(answer: Any, choices: Choices) -> str:
    """The label of the right choice; raises DataError if there is none, or more than one."""
    labels, texts = choices
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(labels):
            return labels[answer]
        raise DataError(f"answer {answer} is no index of a choice; they are 0 to {len(labels) - 1}")
    if not isinstance(answer, str):
        raise DataError(f"field 'answer' is {type(answer).__name__}, expected a letter or index")
    letter = answer.strip().strip("().").upper()
    found = {letter} & {*labels}
    found |= {label for label, text in zip(labels, texts, strict=False) if _same(answer, text)}
    if len(found) == 1:
        return found.pop()
    if found:
        raise DataError(f"answer {answer[:80]!r} is more than one of the choices: give its index")
    choices_are = f"{labels[0]} to {labels[-1]}{', or a text of choices' if texts else ''}"
    raise DataError(f"answer {answer[:80]!r} is none of the choices ({choices_are})")


def named_choice(text: str, choices: Choices, marked: bool) -> str | None:
    r"""The label of the choice that a text names; None if it names none.

    Args:
        marked: whether the text is marked as an answer (<answer>, \boxed), so that a first letter
            is one even if it could be a word ("A").
    """
    text = _WRAPPING.sub("", plain(text)).strip()
    patterns = _patterns("".join(choices.labels))
    if whole := patterns.whole.fullmatch(text):
        return whole[1].upper()
    if label := _by_text(text, choices):
        return label
    if statements := list(patterns.statement.finditer(text)):
        return statements[-1][1].upper()
    if label := _stated_text(text, choices):
        return label
    begun = patterns.begins.match(text)
    if begun and (marked or "\n" not in text):
        return begun[1]
    if marked and re.match(rf"(?:{'|'.join(choices.labels)})\s", text):
        return text[0]
    for pattern in (patterns.other, patterns.alone):
        if letters := pattern.findall(text):
            return str(letters[-1])
    return None


def normalised(text: str) -> str:
    """Lower case, single spaces, without marks of LaTeX and Markdown and final punctuation."""
    return " ".join(_WRAPPING.sub("", plain(text)).split()).strip(_AROUND).lower()


def _by_text(text: str, choices: Choices) -> str | None:
    """The choice whose text this is, perhaps behind its letter; None if none or several are."""
    if len(text) > LONGEST_CHOICE:
        return None
    found = [
        label
        for label, known in zip(choices.labels, choices.texts, strict=False)
        if known and _same(text, known)
    ]
    return found[0] if len(found) == 1 else None


def _stated_text(text: str, choices: Choices) -> str | None:
    """The choice whose text stands behind the last "the answer is", up to the end of its line."""
    if not choices.texts:
        return None
    ends = [said.end() for said in _STATES.finditer(text)]
    if not ends:
        return None
    line = text[ends[-1] : ends[-1] + LONGEST_CHOICE].strip().partition("\n")[0]
    return _by_text(line, choices) or _by_text(re.split(r"[.,;](?:\s|$)", line)[0], choices)


def _same(text: str, known: str) -> bool:
    return normalised(text) == known


@lru_cache(maxsize=64)
def _patterns(labels: str) -> _Patterns:
    """The patterns for these labels. Every repetition is bounded, so that time is linear."""
    letter = f"[{re.escape(labels)}]"
    lower = f"[{re.escape(labels.lower())}]"
    ends = r"(?![\w'’]|\.\d)"
    # A small letter is a choice only in brackets or at the end of what is said ("answer: b").
    stated = (
        rf"(?:(?i:option|choice|letter)\s{{0,3}})?(?:[(\[]\s?)?"
        rf"({letter}{ends}|{lower}(?=[)\]]|\s{{0,3}}\.?\s{{0,3}}(?:\n|\Z)))"
    )
    words = "(?![aAI] [a-z])" if {"A", "I"} & {*labels} else ""
    return _Patterns(
        re.compile(rf"(?i)[(\[]?\s?({letter})\s?[)\]]?\s?[.:,]?"),
        re.compile(
            r"(?<!\w)(?i:answer)\s{0,3}(?:(?i:is|would be|should be|must be)(?!\w)|[:=]|->)"
            rf"\s{{0,3}}:?\s{{0,3}}{stated}"
        ),
        re.compile(rf"[(\[]?({letter})[)\].:](?!\w)"),
        re.compile(rf"(?<!\w)(?i:choice|option)\s{{0,3}}(?:is|:)?\s{{0,3}}[(\[]?({letter}){ends}"),
        re.compile(rf"(?<![\w'’]){words}({letter}){ends}"),
    )


def _are_texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, (str, int, float)) for v in values)


def _is_label(label: str) -> bool:
    return len(label) == 1 and label.isascii() and label.isalnum()
