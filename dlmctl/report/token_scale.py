"""A scale for numbers of tokens: the place of a number between neutral (0) and extreme (-1 or 1).

place(v) = (v - zero) / span, within [-1, 1]

weights              zero = 1, span = max |v - 1|: below 1 a token is pushed less, above 1 more
of both signs        zero = 0, span = max |v|
none below zero      zero = min v, span = max v - min v
none above zero      zero = max v, span = max v - min v: places are negative
roles                no scale, but names: perception is -1, reasoning 1, all else 0
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

ROLES = {0.0: ("other", 0.0), 1.0: ("perception", -1.0), 2.0: ("reasoning", 1.0)}
"""Role of a token in a record to its name and its place."""


class Scale(NamedTuple):
    """The scale of one field."""

    zero: float
    span: float
    low: float
    mean: float
    high: float
    names: Mapping[float, tuple[str, float]]
    """Number to name and place, if numbers stand for kinds; otherwise empty."""

    def place(self, value: float) -> float:
        """The place of a number, from -1 to 1; 0 is neutral."""
        if self.names:
            return self.names[value][1]
        return max(-1.0, min(1.0, (value - self.zero) / self.span)) if self.span else 0.0

    def says(self, value: float | None) -> str:
        """A number for a reader."""
        if value is None:
            return "no value"
        return self.names[value][0] if self.names else f"{value:.4g}"

    def steps(self) -> list[tuple[str, float]]:
        """The steps of a legend from low to high: a number or name, and its place."""
        if self.names:
            return sorted(self.names.values(), key=lambda step: step[1])
        below = [-1.0, -0.5] if self.low < self.zero else []
        above = [0.5, 1.0] if self.high > self.zero else []
        places = [*below, 0.0, *above]
        return [(_brief(self.zero + p * self.span), p) for p in places]

    def summary(self) -> str:
        """Smallest number, mean and largest; empty for names."""
        if self.names:
            return ""
        return f"min {self.low:.4g}, mean {self.mean:.4g}, max {self.high:.4g}"


def fitted(name: str, numbers: Iterable[float | None]) -> Scale:
    """The scale for these numbers of the field `name`, without those that are None."""
    values = [float(value) for value in numbers if value is not None] or [0.0]
    low, high, mean = min(values), max(values), sum(values) / len(values)
    kind = name.rpartition(".")[2]
    if kind == "roles" and set(values) <= ROLES.keys():
        return Scale(0.0, 1.0, low, mean, high, ROLES)
    if kind == "weights":
        zero = 1.0
    elif low < 0 < high:
        zero = 0.0
    else:
        zero = low if low >= 0 else high
    return Scale(zero, max(high - zero, zero - low), low, mean, high, {})


def _brief(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
