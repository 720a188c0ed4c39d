"""Countdown: reach a target from given numbers, each used once, with + - * / and parentheses.

Each problem comes from an expression, so that it has a solution. The digest of its sorted numbers
and its target decides whether it belongs to training or to test, whatever the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

from dlmctl.settings.prompts import Prompts, Split, Style
from dlmctl.tasks.wording import countdown_prompt

LARGEST = 100
"""Numbers and targets are 1 to this, as in the benchmark of d1."""
TEST_SHARE = 8
"""One problem in this many is a test problem."""


class Problem(NamedTuple):
    """Numbers, target and one solution."""

    numbers: list[int]
    target: int
    solution: str


class _Term(NamedTuple):
    value: int
    text: str
    binding: int
    """2 for a number, 1 for a product or quotient, 0 for a sum or difference."""


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task countdown."""
    for numbers, target, solution in problems(settings.split, settings.number_range, seed):
        answer = {"completion": solution} if settings.completions else {}
        yield {**fields(numbers, target, settings.style), **answer}


def fields(numbers: list[int], target: int, style: Style) -> dict[str, Any]:
    """The record of a problem."""
    return {
        "id": f"countdown/{','.join(map(str, numbers))}:{target}",
        "task": "countdown",
        "prompt": countdown_prompt(numbers, target, style),
        "numbers": numbers,
        "target": target,
    }


def problems(
    split: Split = "train", count: tuple[int, int] = (3, 3), seed: int = 0
) -> Iterator[Problem]:
    """An endless stream of problems.

    Args:
        count: fewest and most numbers; each problem draws its number.
    """
    draw = random.Random(f"countdown/{split}/{seed}")
    while True:
        numbers = [draw.randint(1, LARGEST) for _ in range(draw.randint(*count))]
        term = _combine(numbers, draw)
        if term and 1 <= term.value <= LARGEST and split_of(numbers, term.value) == split:
            yield Problem(numbers, term.value, term.text)


def split_of(numbers: list[int], target: int) -> Split:
    """The split that a problem belongs to."""
    text = ",".join(map(str, sorted(numbers))) + f":{target}"
    digest = blake2b(text.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def _combine(numbers: list[int], draw: random.Random) -> _Term | None:
    """A random expression over all numbers; None if it leaves the positive integers."""
    terms = [_Term(n, str(n), 2) for n in numbers]
    while len(terms) > 1:
        first, second = (terms.pop(draw.randrange(len(terms))) for _ in range(2))
        term = _apply(draw.choice("+-*/"), first, second)
        if term is None:
            return None
        terms.append(term)
    return terms[0]


def _apply(operator: str, a: _Term, b: _Term) -> _Term | None:
    if operator == "+":
        return _Term(a.value + b.value, f"{a.text}+{b.text}", 0)
    if operator == "-":
        text = f"{a.text}-{_inner(b, 1)}"
        return _Term(a.value - b.value, text, 0) if a.value > b.value else None
    if operator == "*":
        return _Term(a.value * b.value, f"{_inner(a, 1)}*{_inner(b, 1)}", 1)
    if a.value % b.value:
        return None
    return _Term(a.value // b.value, f"{_inner(a, 1)}/{_inner(b, 2)}", 1)


def _inner(term: _Term, binding: int) -> str:
    """The text of an operand, in parentheses if it binds less tightly than `binding`."""
    return term.text if term.binding >= binding else f"({term.text})"
