"""Scenes of a few drawn things on a grid of three by three cells, and the words for them.

A description names the things in reading order, each by colour, shape, row and column:

    red circle top left , blue square middle center

A composition, the multiset of the colours and shapes of a scene, belongs to one split. With colours
c and shapes s counted from 0 and xor their sum without carry, a test scene is one where

    sum over things of (c xor s)  mod 4 = 0

Given either the colour or the shape of one thing, c xor s takes each of its four values once: as
long as one thing is free in one of the two, either side is as open to it as to any other. Were
compositions assigned by a digest, what a question tells of a scene would tell of the split.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from dlmctl.settings.prompts import Split

COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


class Thing(NamedTuple):
    """One thing of a scene."""

    colour: str
    shape: str
    row: str
    column: str

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


_WORDS = Thing(*map("|".join, (COLOURS, SHAPES, ROWS, COLUMNS)))
_THING = re.compile(
    rf"\s*({_WORDS.colour})\s+({_WORDS.shape})\s+({_WORDS.row})\s+({_WORDS.column})\s*"
)


def split_of(kinds: Iterable[tuple[str, str]]) -> Split:
    """The split that a composition, colour and shape of each thing, belongs to."""
    total = sum(COLOURS.index(colour) ^ SHAPES.index(shape) for colour, shape in kinds)
    return "test" if total % 4 == 0 else "train"


def describe(scene: Iterable[Thing]) -> str:
    """The things of a scene in words."""
    return " , ".join(" ".join(thing) for thing in scene)


def described(text: str) -> list[Thing | None]:
    """The things that a description names; None for each that is not in the grammar.

    Capitals, a full stop at the end and the spaces around commas do not matter.
    """
    parts = text.strip().rstrip(".").lower().split(",")
    found = (_THING.fullmatch(part) for part in parts)
    return [Thing(*match.groups()) if match else None for match in found]
