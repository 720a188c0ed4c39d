"""Expressions over positive integers that stay positive integers, and how they are worked out.

`(95+75)/85` is worked out as `170/85`, then `2`: one operation a step, left operands first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Term(NamedTuple):
    """A number, or an operation on two terms."""

    value: int
    text: str
    """With the parentheses that it needs, and no others."""
    binding: int
    """2 for a number, 1 for a product or quotient, 0 for a sum or difference."""
    parts: tuple[str, Term, Term] | None = None
    """Operator and operands; None for a number."""


def number(value: int) -> Term:
    """The term of a number."""
    return Term(value, str(value), 2)


def apply(operator: str, a: Term, b: Term) -> Term | None:
    """The term of an operation on two terms; None if its value is no positive integer."""
    parts = (operator, a, b)
    if operator == "+":
        return Term(a.value + b.value, f"{a.text}+{b.text}", 0, parts)
    if operator == "-":
        text = f"{a.text}-{_inner(b, 1)}"
        return Term(a.value - b.value, text, 0, parts) if a.value > b.value else None
    if operator == "*":
        return Term(a.value * b.value, f"{_inner(a, 1)}*{_inner(b, 1)}", 1, parts)
    if a.value % b.value:
        return None
    return Term(a.value // b.value, f"{_inner(a, 1)}/{_inner(b, 2)}", 1, parts)


def steps(term: Term) -> Iterator[str]:
    """The expression after each operation; the last is its value, and a number has no step."""
    while term.parts is not None:
        term = _reduced(term)
        yield term.text


def _reduced(term: Term) -> Term:
    """The term after one operation on two numbers, in a left operand first."""
    assert term.parts is not None
    operator, a, b = term.parts
    if a.parts is None and b.parts is None:
        return number(term.value)
    done = apply(operator, *((a, _reduced(b)) if a.parts is None else (_reduced(a), b)))
    assert done is not None  # its value is that of the term
    return done


def _inner(term: Term, binding: int) -> str:
    """The text of an operand, in parentheses if it binds less tightly than `binding`."""
    return term.text if term.binding >= binding else f"({term.text})"
