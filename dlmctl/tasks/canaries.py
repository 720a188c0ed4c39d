"""Canaries: secrets to plant in training data, so as to see whether a model gives them back.

A key of eight random digits stands before a secret of sixteen. Nothing tells the secret but having
seen it, so that whatever a model knows of it beyond 16 ln 10 nats is memory. (The idea of Carlini
et al., arXiv 1802.08232; the form is ours.) How often a canary is planted is up to who plants it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from dlmctl.tasks.sudoku import Split

KEY, SECRET = 8, 16
"""Digits of both."""


class Canary(NamedTuple):
    """A key, and what only training can tell of it."""

    key: str
    secret: str


def canaries(split: Split = "train", seed: int = 0) -> Iterator[Canary]:
    """An endless stream of canaries; keys of training are even numbers, those of test odd ones."""
    draw = random.Random(f"canaries/{split}/{seed}")
    while True:
        digits = [draw.choice("0123456789") for _ in range(KEY - 1)]
        last = draw.choice("02468" if split == "train" else "13579")
        secret = "".join(draw.choice("0123456789") for _ in range(SECRET))
        yield Canary("".join([*digits, last]), secret)
