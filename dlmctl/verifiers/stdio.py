"""Tests of programs by what they print for an input, as in APPS, TACO and LiveCodeBench.

    input_output          {"inputs": [...], "outputs": [...]}, an object or its JSON
    tests, or public_test_cases and private_test_cases
                          [{"input": ..., "output": ...}, ...], a list or its JSON

An input or output is a text, or a list of lines. A program is right if it ends with exit code 0 and
prints what is expected, by LiveCodeBench's rule: white space at both ends of the text and of every
line does not count; lines must be equal, or have as many words that are all numbers and equal as
decimals (1.50 is 1.5, and there is no tolerance).
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any, NamedTuple

import orjson

from dlmctl.records.errors import DataError

FIELDS = ("public_test_cases", "private_test_cases")


class Case(NamedTuple):
    """A test."""

    given: str
    """Standard input."""
    expected: str
    """Standard output."""


def cases(record: Mapping[str, Any]) -> list[Case]:
    """The tests of a record that are of this kind; raises DataError if they have another form."""
    pairs = _decoded("tests", record.get("tests"))
    if isinstance(pairs, list) and any(isinstance(pair, dict) for pair in pairs):
        return _from_pairs("tests", pairs)
    if record.get("tests"):
        return []
    table = _decoded("input_output", record.get("input_output"), needed=True)
    if table:
        return _from_table(table)
    found = []
    for name in FIELDS:
        pairs = _decoded(name, record.get(name), needed=True)
        found += _from_pairs(name, pairs) if pairs else []
    return found


def agrees(printed: str, expected: str) -> bool:
    """Whether a program printed what is expected, up to white space and the writing of numbers."""
    ours, theirs = (
        [line.strip() for line in text.strip().split("\n")] for text in (printed, expected)
    )
    return len(ours) == len(theirs) and all(
        a == b or _same_numbers(a, b) for a, b in zip(ours, theirs, strict=True)
    )


def _same_numbers(ours: str, theirs: str) -> bool:
    a, b = ours.split(), theirs.split()
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _equal(ours: str, theirs: str) -> bool:
    """Whether two words are numbers, finite, and equal."""
    if "_" in ours or "_" in theirs:
        return False
    try:
        a, b = Decimal(ours), Decimal(theirs)
    except InvalidOperation:
        return False
    return a.is_finite() and b.is_finite() and a == b


def _decoded(name: str, value: Any, needed: bool = False) -> Any:
    """A field that may be JSON; text that is none is an error if `needed`, else stays text."""
    if not isinstance(value, str) or not value.strip():
        return value or None
    try:
        return orjson.loads(value)
    except orjson.JSONDecodeError:
        if not needed:
            return value
    compressed = (
        "; LiveCodeBench compresses a pickle there, which is never read: write the tests as JSON, "
        "or leave the field out to judge by the others"
    )
    raise DataError(f"field '{name}' is not JSON{compressed if name == FIELDS[1] else ''}")


def _from_table(table: Any) -> list[Case]:
    inputs = table.get("inputs") if isinstance(table, dict) else None
    outputs = table.get("outputs") if isinstance(table, dict) else None
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise DataError(
            'field \'input_output\' is not {"inputs": [...], "outputs": [...]} of equal lengths'
        )
    if table.get("fn_name"):
        raise DataError(
            "field 'input_output' has calls of a function (fn_name), and only programs that read "
            "standard input are run: write calls as assertions in 'tests'"
        )
    return [
        Case(_text("input_output", given), _text("input_output", expected))
        for given, expected in zip(inputs, outputs, strict=True)
    ]


def _from_pairs(name: str, pairs: Any) -> list[Case]:
    if not isinstance(pairs, list) or not all(
        isinstance(pair, dict) and {"input", "output"} <= pair.keys() for pair in pairs
    ):
        raise DataError(f"field '{name}' is not a list of objects with 'input' and 'output'")
    if any(pair.get("testtype", "stdin") != "stdin" for pair in pairs):
        raise DataError(
            f"field '{name}' has calls of a function (testtype), and only programs that read "
            "standard input are run: write calls as assertions in 'tests'"
        )
    return [Case(_text(name, pair["input"]), _text(name, pair["output"])) for pair in pairs]


def _text(name: str, value: Any) -> str:
    lines = value if isinstance(value, list) else [value]
    if not all(isinstance(line, str) for line in lines):
        raise DataError(f"an input or output of field '{name}' is neither text nor a list of lines")
    return "\n".join(lines)
