"""Laws that masks are drawn by."""

from __future__ import annotations

from typing import Literal, get_args

Law = Literal[
    "independent", "uniform", "complementary", "stratified", "quadrature", "block", "full"
]
LAWS: tuple[str, ...] = get_args(Law)
UNBIASED: tuple[Law, ...] = ("independent", "uniform", "complementary", "stratified")
PAIRED = frozenset({"complementary", "stratified"})
"""Laws whose masks come as a mask and its complement."""
LEVELLED: tuple[Law, ...] = ("independent", "quadrature")
"""Laws that draw a level t."""
