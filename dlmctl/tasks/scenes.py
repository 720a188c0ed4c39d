"""Scenes of a few things on a grid of three by three cells, and the words for them.

A description names the things in reading order, each by colour, shape, row and column:

    red circle top left , blue square middle center

A shorter one leaves out the places: `red circle , blue square`.

A composition, the multiset of the colours and shapes of a scene, belongs to one split. With colours
c and shapes s counted from 0, and xor their sum without carry, a scene is a test scene if

    sum over things of (c xor s)  mod 4 = 0

Given only the colour or only the shape of a thing, c xor s takes each of its four values once: as
long as one thing is free in one of the two, both splits are as open to it as to any other. If a
digest assigned compositions to splits, what a question reveals about a scene would reveal something
about the split.
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
    row: str = ""
    """Empty, as the column, where a description does not say the place."""
    column: str = ""

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


_WORDS = Thing(*map("|".join, (COLOURS, SHAPES, ROWS, COLUMNS)))
_THING = re.compile(
    rf"\s*({_WORDS.colour})\s+({_WORDS.shape})(?:\s+({_WORDS.row})\s+({_WORDS.column}))?\s*"
)


def split_of(kinds: Iterable[tuple[str, str]]) -> Split:
    """The split of a composition, given the colour and shape of each thing."""
    total = sum(COLOURS.index(colour) ^ SHAPES.index(shape) for colour, shape in kinds)
    return "test" if total % 4 == 0 else "train"


def describe(scene: Iterable[Thing]) -> str:
    """A scene in words."""
    return " , ".join(" ".join(filter(None, thing)) for thing in scene)


def described(text: str) -> list[Thing | None]:
    """The things that a description names; None for each part outside of the grammar.

    Capitals, a full stop at the end and spaces around commas do not matter.
    """
    parts = text.strip().rstrip(".").lower().split(",")
    matches = (_THING.fullmatch(part) for part in parts)
    return [Thing(*match.groups("")) if match else None for match in matches]
