"""Verifier `concepts`: which planted concepts a text expresses, by the words of the generator.

`wanted` of a record says what is asked for, as {"sentiment": "positive"}. The reward is the share
of the value among the expressions of the concept in the completion; a text without any gets 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.tasks.concepts import CONCEPTS, expressions
from dlmctl.verifiers.answer import Verdict, completion_text


def concepts(record: Mapping[str, Any]) -> Verdict:
    """The share of the wanted value, averaged over the concepts asked for.

    Raises:
        DataError: `wanted` is missing, or names an unknown concept or value.
    """
    wanted = record.get("wanted")
    if not isinstance(wanted, dict) or not wanted:
        raise DataError(
            "field 'wanted' is missing, which says the concept and its value: 'dlmctl prompts "
            "concepts --want sentiment=positive' writes it"
        )
    text, counts = completion_text(record), {}
    for concept, value in wanted.items():
        if value not in CONCEPTS.get(concept, ()):
            raise DataError(f"there is no value '{value}' of a concept '{concept}'")
        counts[concept] = {
            name: len(expression_spans(text, concept, name)) for name in CONCEPTS[concept]
        }
    shares = [of[wanted[concept]] / max(1, sum(of.values())) for concept, of in counts.items()]
    return Verdict(sum(shares) / len(shares), {"expressions": counts})


def expression_spans(text: str, concept: str, value: str) -> list[tuple[int, int]]:
    """Start and end of each expression in a text of a value that CONCEPTS has."""
    plain = text.lower()
    if concept != "tense":
        # "a week ago" and "these days" express a time, not a number.
        plain = _times().sub(lambda time: " " * len(time[0]), plain)
    return [match.span() for match in _pattern(concept, value).finditer(plain)]


@cache
def _pattern(concept: str, value: str) -> re.Pattern[str]:
    return _any_of(expressions(concept, value))


@cache
def _times() -> re.Pattern[str]:
    return _any_of(phrase for time in CONCEPTS["tense"] for phrase in expressions("tense", time))


def _any_of(phrases: Iterable[str]) -> re.Pattern[str]:
    words = sorted(phrases, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
