"""Laws that masks are drawn by."""

from __future__ import annotations

from typing import Literal, get_args

Law = Literal[
    "independent",
    "uniform",
    "complementary",
    "stratified",
    "quadrature",
    "block",
    "full",
    "coupled",
    "trajectory",
    "left-to-right",
]
LAWS: tuple[str, ...] = get_args(Law)
UNBIASED: tuple[Law, ...] = ("independent", "uniform", "complementary", "stratified")
TOGETHER: dict[str, int] = {"complementary": 2, "stratified": 2, "coupled": 3}
"""Laws whose masks come in pairs or threes that are one draw, and how many."""
LEVELLED: tuple[Law, ...] = ("independent", "quadrature")
"""Laws that draw a level t."""
ORDERED: tuple[Law, ...] = ("trajectory", "left-to-right")
"""Laws that score every token once, in the order of decoding: what they sum to is exact."""
ALL = 0
"""As a number of masks: all that an ordered law has."""
