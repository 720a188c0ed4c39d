"""Parsers of option texts: NAME=VALUE, ranges, lists of numbers, sizes.

Those that take the option's name need it for their message.
"""

from __future__ import annotations

import math
from fractions import Fraction

from dlmctl.records.errors import UsageError

DIGITS = 18
"""Most digits of a whole number on the command line, so that it fits into 64 bits."""


def named_text(option: str, text: str, form: str) -> tuple[str, str]:
    """Name and value of NAME=VALUE, neither empty; raises UsageError if it is not of that form.

    Args:
        form: what the message asks for, such as FIELD=COLUMN.
    """
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"{option} {text} is not {form}")
    return name, value


def named_number(option: str, text: str, form: str) -> tuple[str, float]:
    """Name and number of NAME=NUMBER; raises UsageError if it is not of that form."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"{option} {text} is not {form}") from None


def whole_range(option: str, text: str, least: int, most: int) -> tuple[int, int]:
    """First and last number of N or N-M; raises UsageError unless both are within the bounds."""
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        raise UsageError(f"{option} {text} is neither a number nor a range such as 6-10") from None
    if not least <= low <= high <= most:
        raise UsageError(f"{option} {text} is not within {least} and {most}")
    return low, high


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of a list like 2,4,8; raises UsageError if one is not a whole number >= 1."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) <= DIGITS and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text} is not a list of whole numbers from 1 on")
    return [int(part) for part in parts]


def fractions(option: str, text: str) -> list[Fraction]:
    """The numbers of a list like 1/32,0.5; raises UsageError if one is not a number."""
    try:
        return [Fraction(part) for part in text.split(",")]
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"{option} {text} is not a list of numbers such as 1/32,0.5") from None


def number_pair(option: str, text: str, form: str) -> tuple[float, float]:
    """The numbers of a pair like 0.8,1.2; raises UsageError if it is not one."""
    low, _, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise UsageError(f"{option} {text} is not {form}") from None


def level_range(text: str) -> tuple[float, float]:
    """Least and greatest level of --t 0.3 or --t 0.05-0.5; raises UsageError if it is neither."""
    first, _, last = text.partition("-")
    try:
        return float(first), float(last or first)
    except ValueError:
        raise UsageError(f"--t {text} is neither a number nor a range such as 0.05-0.5") from None


def byte_count(option: str, text: str) -> int:
    """Bytes of a size like 512M or 2G; raises UsageError if it is not one."""
    number, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not number.isdecimal() or len(number) > DIGITS or len(unit) > 1:
        raise UsageError(f"{option} {text} is not a size such as 512M or 2G")
    return int(number) * 1024 ** ("KMG".index(unit) + 1 if unit else 0)


def float_grid(option: str, text: str) -> list[float]:
    """The numbers of a list like 1,10,1e3, or of LOW:HIGH:COUNT, which is even in the logarithm.

    Raises:
        UsageError: the text is neither.
    """
    try:
        if ":" not in text:
            numbers = [float(part) for part in text.split(",")]
            if not all(map(math.isfinite, numbers)):
                raise ValueError
            return numbers
        low, high, count = text.split(":")
        first, last, many = float(low), float(high), int(count)
        if not 0 < first < last < math.inf or many < 2:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{option} {text} is neither a list of numbers nor LOW:HIGH:COUNT with 0 < LOW < HIGH"
        ) from None
    ratio = (last / first) ** (1 / (many - 1))
    return [first * ratio**number for number in range(many - 1)] + [last]
