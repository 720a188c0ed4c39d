"""Arithmetic: sums and differences of numbers with two digits, as `47+38-19=`.

The digest of its numbers with their signs, sorted, decides whether a problem belongs to training or
to test, so that `38+47` is on the side of `47+38`. Nothing on the way is below 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from dlmctl.settings.prompts import Prompts
from dlmctl.tasks.countdown import side_of
from dlmctl.tasks.expressions import Term, apply, number, steps
from dlmctl.tasks.wording import arithmetic_prompt

NUMBERS = range(10, 100)


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task arithmetic."""
    draw = random.Random(f"arithmetic/{settings.split}/{seed}")
    while True:
        drawn = [draw.choice(NUMBERS) for _ in range(draw.randint(*settings.number_range))]
        signs = ["+", *draw.choices("+-", k=len(drawn) - 1)]
        term = _chain(signs, drawn)
        key = ",".join(sorted(f"{sign}{value}" for sign, value in zip(signs, drawn, strict=True)))
        if term is not None and side_of(key) == settings.split:
            yield _record(term, settings)


def _chain(signs: list[str], numbers: list[int]) -> Term | None:
    """The numbers added up from left to right; None if a sum on the way is below 1."""
    term: Term | None = number(numbers[0])
    for sign, value in zip(signs[1:], numbers[1:], strict=True):
        if term is not None:
            term = apply(sign, term, number(value))
    return term


def _record(term: Term, settings: Prompts) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": f"arithmetic/{term.text}",
        "task": "arithmetic",
        "prompt": arithmetic_prompt(term.text, settings.style),
        "answer": term.value,
    }
    if settings.completions:
        record["completion"] = "=".join(steps(term)) if settings.worked else str(term.value)
    return record
