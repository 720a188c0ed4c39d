"""Verifiers of Countdown: an expression over the given numbers, each used once, for the target.

`countdown` judges the expression, `countdown-steps` also how it is worked out.

The expression is parsed, never evaluated as code: + - * / and parentheses over exact rationals. The
grammar refuses `90**43**90`, which a filter of characters lets through to `eval`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.typography import plain

LONGEST = 200
"""Most characters of an expression; a longer one is no answer to six numbers."""

LATEX = [
    (r"\\(?:left|right|,|!|;|:|quad|displaystyle)(?![a-zA-Z])", " "),
    (r"\\(?:times|cdot|ast)(?![a-zA-Z])", "*"),
    (r"\\div(?![a-zA-Z])", "/"),
    (r"\\text\s*\{([^{}]*)\}", r" \1 "),
    (r"\\[()\[\]]|\$|`", " "),
    (r"\[", "("),
    (r"\]", ")"),
]
FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
EXPRESSION = re.compile(r"[\d\s+\-*/().]+")
TARGET = re.compile(r"\s*[+-]?[\d.]+(?:/\d+|[eE][+-]?\d{1,3})?\s*")
"""With few digits in the exponent: Fraction would expand 1e999999999."""


class NotAnExpressionError(ValueError):
    """The text is no expression of this grammar; the message says why."""


def countdown(record: Mapping[str, Any]) -> Verdict:
    """1 if the answer uses exactly the given numbers and makes the target."""
    numbers, target = required(record, "numbers"), required(record, "target")
    numbers, target = _given(numbers, target)
    text, _ = answer_text(completion_text(record))
    expression = find_expression(text)
    if expression is None:
        return judged(False, "no expression found", expression=None)
    try:
        value, used = evaluate(expression)
    except NotAnExpressionError as error:
        return judged(False, str(error), expression=expression[:LONGEST])
    if sorted(used) != numbers:
        return judged(False, f"uses {sorted(used)}, given {numbers}", expression=expression)
    if value != target:
        return judged(False, f"makes {value}, wanted {target}", expression=expression)
    return judged(True, expression=expression)


def countdown_steps(record: Mapping[str, Any]) -> Verdict:
    """Share of the parts that are right of an answer worked out as (95+75)/85=170/85=2.

    With n numbers there are n + 1 parts: the expression uses the numbers; each of n - 1 steps does
    one operation and keeps the value; the last step is the target. It is 1 only if `countdown` is,
    which `correct` goes by.
    """
    numbers, target = _given(required(record, "numbers"), required(record, "target"))
    correct = countdown(record).detail["correct"]
    text, _ = answer_text(completion_text(record))
    sides = [_value_and_numbers(side) for side in plain(text).split("=")]
    if len(sides) > len(numbers):
        return Verdict(0.0, {"correct": correct, "why": f"more than {len(numbers) - 1} steps"})
    sides += [None] * (len(numbers) - len(sides))
    parts = [sides[0] is not None and sorted(sides[0][1]) == numbers]
    for before, after in pairwise(sides):
        left = len(numbers) - len(parts)
        keeps = before is not None and after is not None and before[0] == after[0]
        parts.append(keeps and after is not None and len(after[1]) == left)
    last = sides[-1]
    parts.append(last is not None and last[0] == target and len(last[1]) == 1)
    share = sum(parts) / len(parts)
    return Verdict(share, {"correct": correct, "parts": parts})


def _value_and_numbers(expression: str) -> tuple[Fraction, list[int]] | None:
    try:
        return evaluate(expression)
    except NotAnExpressionError:
        return None


def _given(numbers: Any, target: Any) -> tuple[list[int], Fraction]:
    """Sorted numbers and target; raises DataError if they are none."""
    text = str(target)
    try:
        if len(text) > LONGEST or not TARGET.fullmatch(text):
            raise ValueError
        return sorted(int(n) for n in numbers), Fraction(text)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        shown = f"numbers {str(numbers)[:LONGEST]} and target {text[:LONGEST]}"
        raise DataError(f"{shown} are not numbers") from None


def find_expression(text: str) -> str | None:
    """The expression in an answer, without LaTeX: the side of `expression = value` with operators.

    In prose, it is the last stretch that has an operator between numbers.
    """
    text = plain(text)
    for pattern, written in LATEX:
        text = re.sub(pattern, written, text)
    # A pass resolves the innermost fractions; more levels give more than LONGEST characters.
    for _ in range(LONGEST // len("((1)/(1))") + 1):
        text, opened = FRACTION.subn(r"((\1)/(\2))", text)
        if not opened:
            break
    sides = [side.strip() for line in text.splitlines() for side in line.split("=")]
    whole = [side for side in sides if EXPRESSION.fullmatch(side)]
    in_prose = [stretch.strip(" .\n") for side in sides for stretch in EXPRESSION.findall(side)]
    for candidates in (whole, in_prose):
        working = [c for c in candidates if re.search(r"\d\s*[+\-*/]|\)\s*[+\-*/]", c)]
        if working:
            return working[0] if candidates is whole else working[-1]
    return next((side for side in whole if side), None)


def evaluate(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression and the numbers in it.

    Raises:
        NotAnExpressionError: it is too long, or more than + - * / and parentheses over integers.
    """
    if len(expression) > LONGEST:
        raise NotAnExpressionError(f"more than {LONGEST} characters")
    if "_" in expression:
        raise NotAnExpressionError("not arithmetic")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NotAnExpressionError("not arithmetic") from None
    used: list[int] = []
    return _walk(tree.body, used), used


def _walk(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _walk(node.left, used), _walk(node.right, used)
        if isinstance(node.op, ast.Add):
            return left + right
        if isinstance(node.op, ast.Sub):
            return left - right
        if isinstance(node.op, ast.Mult):
            return left * right
        if isinstance(node.op, ast.Div):
            if right == 0:
                raise NotAnExpressionError("divides by zero")
            return left / right
    raise NotAnExpressionError("more than + - * / and parentheses over whole numbers")
