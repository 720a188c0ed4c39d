"""Rates and times as a person says them."""

from __future__ import annotations


def pace(per_second: float) -> str:
    """A rate in the first unit in which it is at least 1: 5.6/s, 12/min, 3.2/h."""
    per, unit = per_second, "s"
    for longer in ("min", "h"):
        if per < 1:
            per, unit = 60 * per, longer
    return f"{per:.1f}/{unit}" if per < 10 else f"{per:,.0f}/{unit}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 34 s, 2 min 34 s, 5 h 12 min, 3 d 4 h."""
    rest, parts = round(seconds), list[str]()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if rest >= size or (unit == "s" and not parts):
            parts.append(f"{rest // size} {unit}")
        elif parts:
            break
        rest %= size
    return " ".join(parts[:2])
