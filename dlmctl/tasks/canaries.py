"""Canaries: secrets to plant in training data, in order to see whether a model reproduces them.

A key of eight random digits precedes a secret of sixteen. Only training on it can tell the secret,
so that whatever a model knows of it beyond 16 ln 10 nats is memory. (The idea is from Carlini et
al., arXiv 1802.08232; the form is ours.) Who plants a canary decides how often.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from dlmctl.settings.prompts import Prompts, Split

KEY, SECRET = 8, 16
"""Digits of both."""


class Canary(NamedTuple):
    """A key, and what only training can tell of it."""

    key: str
    secret: str


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task canaries."""
    for key, secret in canaries(settings.split, seed):
        yield {
            "id": f"canaries/{key}",
            "task": "canaries",
            "prompt": f"{key}=",
            "answer": secret,
            "completion": secret,
        }


def canaries(split: Split = "train", seed: int = 0) -> Iterator[Canary]:
    """An endless stream of canaries; keys of training are even numbers, those of test odd ones."""
    draw = random.Random(f"canaries/{split}/{seed}")
    while True:
        digits = [draw.choice("0123456789") for _ in range(KEY - 1)]
        last = draw.choice("02468" if split == "train" else "13579")
        secret = "".join(draw.choice("0123456789") for _ in range(SECRET))
        yield Canary("".join([*digits, last]), secret)
