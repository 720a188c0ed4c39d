"""Which planted concepts a text expresses, by the words of the generator that it is written with.

A record says by `wanted` what is asked for, as {"sentiment": "positive"}. The reward is the share
of the expressions of the concept in the completion that are those of the value; a text that has
none gets 0.
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
    """The share of the wanted value, a mean over the concepts that are asked for.

    Raises:
        DataError: `wanted` is missing or names no concept and value of the generator.
    """
    wanted = record.get("wanted")
    if not isinstance(wanted, dict) or not wanted:
        raise DataError(
            "field 'wanted' is missing, which says the concept and its value: 'dlmctl prompts "
            "concepts --want sentiment=positive' writes it"
        )
    text, found = completion_text(record).lower(), {}
    for concept, value in wanted.items():
        if value not in CONCEPTS.get(concept, ()):
            raise DataError(f"there is no value '{value}' of a concept '{concept}'")
        # "a week ago" and "these days" say when, not how many.
        said = text if concept == "tense" else _times().sub("", text)
        found[concept] = {
            name: len(_pattern(concept, name).findall(said)) for name in CONCEPTS[concept]
        }
    shares = [
        counts[wanted[concept]] / max(1, sum(counts.values())) for concept, counts in found.items()
    ]
    return Verdict(sum(shares) / len(shares), {"expressions": found})


@cache
def _pattern(concept: str, value: str) -> re.Pattern[str]:
    return _any_of(expressions(concept, value))


@cache
def _times() -> re.Pattern[str]:
    return _any_of(phrase for time in CONCEPTS["tense"] for phrase in expressions("tense", time))


def _any_of(phrases: Iterable[str]) -> re.Pattern[str]:
    words = sorted(phrases, key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")
