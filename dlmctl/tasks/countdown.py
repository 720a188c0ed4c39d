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
from dlmctl.tasks.expressions import Term, apply, number, steps
from dlmctl.tasks.wording import countdown_prompt

LARGEST = 100
"""Numbers and targets are 1 to this, as in the benchmark of d1."""
TEST_SHARE = 8
"""One problem in this many is a test problem."""


class Problem(NamedTuple):
    """Numbers, target and one solution."""

    numbers: list[int]
    target: int
    solution: Term


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task countdown."""
    for numbers, target, solution in problems(settings.split, settings.number_range, seed):
        record = fields(numbers, target, settings.style)
        if settings.completions:
            worked = steps(solution) if settings.worked else ()
            record["completion"] = "=".join((solution.text, *worked))
        yield record


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
            yield Problem(numbers, term.value, term)


def split_of(numbers: list[int], target: int) -> Split:
    """The split that a problem belongs to."""
    return side_of(",".join(map(str, sorted(numbers))) + f":{target}")


def side_of(text: str) -> Split:
    """The split of whatever a text stands for."""
    digest = blake2b(text.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def _combine(numbers: list[int], draw: random.Random) -> Term | None:
    """A random expression over all numbers; None if it leaves the positive integers."""
    terms = [number(n) for n in numbers]
    while len(terms) > 1:
        first, second = (terms.pop(draw.randrange(len(terms))) for _ in range(2))
        term = apply(draw.choice("+-*/"), first, second)
        if term is None:
            return None
        terms.append(term)
    return terms[0]
