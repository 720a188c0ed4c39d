"""Parsers of option texts: NAME=VALUE pairs, ranges, lists of numbers, sizes.

Each takes the option's name for its message, and raises UsageError if the text has another form.
"""

from __future__ import annotations

from dlmctl.records.errors import UsageError

DIGITS = 18
"""Most digits of a whole number on the command line, so that it fits into 64 bits."""


def pair(option: str, form: str, text: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE, neither of them empty.

    Args:
        form: the form that the message asks for, such as FIELD=COLUMN.
    """
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{option} {text} is not {form}")
    return name, value


def number_pair(option: str, form: str, text: str) -> tuple[str, float]:
    """Name and number of NAME=NUMBER; `form` as in `pair`."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"{option} {text} is not {form}") from None


def whole_range(option: str, text: str, least: int, most: int) -> tuple[int, int]:
    """First and last number of N or N-M, both within `least` and `most`."""
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        raise UsageError(f"{option} {text} is neither a number nor a range such as 6-10") from None
    if not least <= low <= high <= most:
        raise UsageError(f"{option} {text} is not within {least} and {most}")
    return low, high


def whole_numbers(option: str, text: str) -> list[int]:
    """Numbers of a list such as 2,4,8, each at least 1."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) <= DIGITS and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text} is not a list of whole numbers from 1 on")
    return [int(part) for part in parts]


def byte_count(option: str, text: str) -> int:
    """Bytes of a size such as 512M or 2G."""
    number, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not number.isdecimal() or len(number) > DIGITS or len(unit) > 1:
        raise UsageError(f"{option} {text} is not a size such as 512M or 2G")
    return int(number) * 1024 ** ("KMG".index(unit) + 1 if unit else 0)
