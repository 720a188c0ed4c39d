"""Texts of options that are more than one value."""

from __future__ import annotations

from dlmctl.records.errors import UsageError

DIGITS = 18
"""Most digits of a whole number on the command line, so that it fits into 64 bits."""


def whole_numbers(option: str, text: str) -> list[int]:
    """The numbers of a list like 2,4,8; raises UsageError if one is not a whole number >= 1."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) <= DIGITS and int(part) > 0 for part in parts):
        raise UsageError(f"{option} {text} is not a list of whole numbers from 1 on")
    return [int(part) for part in parts]


def number_pair(option: str, text: str, form: str) -> tuple[float, float]:
    """The numbers of a pair like 0.8,1.2; raises UsageError if it is none."""
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
    """Bytes of a size like 512M or 2G; raises UsageError if it is none."""
    number, unit = text.rstrip("KMGkmg"), text[len(text.rstrip("KMGkmg")) :].upper()
    if not number.isdecimal() or len(number) > DIGITS or len(unit) > 1:
        raise UsageError(f"{option} {text} is not a size such as 512M or 2G")
    return int(number) * 1024 ** ("KMG".index(unit) + 1 if unit else 0)
