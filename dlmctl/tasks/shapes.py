r"""Questions about drawn scenes, each with the answer, which is chosen before the scene is.

    count      how many red circles?                        0 to 4
    sum        how many red plus how many squares?          0 to 6; a red square counts twice
    colour     what colour is the star?                     the one of its shape
    position   where is the blue square from the red star?  left, right, above, below

A question and its answer are drawn uniformly, and then a scene that fits them, so that the question
alone tells nothing: the answer most frequent for it among 8000 train problems is right in 21 % of
4000 test problems (count 21, sum 14, colour 24, position 25).

A right response, of few words, describes the scene first and then says again what matters:

    <description> red circle top left , blue square top right </description>
    <think> red circle : 1 </think> \boxed{1}
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import product
from typing import Literal, NamedTuple

from dlmctl.tasks.drawing import Look
from dlmctl.tasks.layout import TAGS
from dlmctl.tasks.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Thing, describe, split_of
from dlmctl.tasks.sudoku import Split

Kind = Literal["count", "colour", "position", "sum"]
KINDS: tuple[Kind, ...] = ("count", "colour", "position", "sum")
THINGS = (2, 5)
"""Fewest and most in a scene."""
MOST = {"count": 4, "sum": 6}
"""Largest answer of a kind; the smallest is 0."""
CELL = 28
"""Pixels of a cell's side."""
_TYPES = tuple(product(COLOURS, SHAPES))
_PLACES = tuple(product(ROWS, COLUMNS))


class Problem(NamedTuple):
    """A question about a scene."""

    kind: Kind
    question: str
    answer: str
    thought: str
    """What follows from the description, in words."""
    scene: list[Thing]
    """In reading order."""
    looks: list[Look]

    @property
    def digest(self) -> str:
        """Of the question and of everything that is drawn."""
        text = repr((self.question, self.scene, self.looks))
        return blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def completion(self) -> str:
        """A right response."""
        seen, thought = TAGS.perception, TAGS.reasoning
        return (
            f"<{seen}> {describe(self.scene)} </{seen}> "
            f"<{thought}> {self.thought} </{thought}> \\boxed{{{self.answer}}}"
        )


class _Wanted(NamedTuple):
    """What is counted: things of a colour, of a shape, or of both."""

    colour: str = ""
    shape: str = ""

    def fits(self, colour: str, shape: str) -> bool:
        return self.colour in ("", colour) and self.shape in ("", shape)

    @property
    def words(self) -> str:
        return " ".join(filter(None, (self.colour, self.shape and self.shape + "s")))


class _Ask(NamedTuple):
    """A question and its answer, for which scenes can be composed."""

    question: str
    answer: str
    compose: Callable[[random.Random], list[Thing]]
    explain: Callable[[list[Thing]], str]


def problems(
    split: Split = "train", seed: int = 0, kinds: Sequence[Kind] = KINDS
) -> Iterator[Problem]:
    """An endless stream of problems of these kinds, each as likely."""
    draw = random.Random(f"shapes/{split}/{seed}")
    while True:
        kind = draw.choice(kinds)
        ask = _ASKS[kind](draw)
        scene: list[Thing] = []
        while not scene or split_of((t.colour, t.shape) for t in scene) != split:
            scene = sorted(ask.compose(draw), key=lambda t: _PLACES.index((t.row, t.column)))
        looks = [Look(draw.random(), draw.random(), draw.random()) for _ in scene]
        yield Problem(kind, ask.question, ask.answer, ask.explain(scene), scene, looks)


def _count(draw: random.Random) -> _Ask:
    form = draw.choice(("colour", "shape", "both"))
    colour = "" if form == "shape" else draw.choice(COLOURS)
    shape = "" if form == "colour" else draw.choice(SHAPES)
    return _amount([_Wanted(colour, shape)], draw.randint(0, MOST["count"]))


def _sum(draw: random.Random) -> _Ask:
    wanted = [_Wanted(colour=draw.choice(COLOURS)), _Wanted(shape=draw.choice(SHAPES))]
    draw.shuffle(wanted)
    return _amount(wanted, draw.randint(0, MOST["sum"]))


def _amount(wanted: list[_Wanted], total: int) -> _Ask:
    """How many there are of what is wanted, added up."""
    worth = {kind: sum(w.fits(*kind) for w in wanted) for kind in _TYPES}
    fewest = max(THINGS[0], -(-total // max(worth.values())))

    def compose(draw: random.Random) -> list[Thing]:
        number, shares = draw.randint(fewest, THINGS[1]), [-1]
        while sum(shares) != total:
            shares = draw.choices(sorted(set(worth.values())), k=number)
        return _placed([draw.choice([k for k in _TYPES if worth[k] == s]) for s in shares], draw)

    def explain(scene: list[Thing]) -> str:
        said, counts = [], []
        for w in wanted:
            names = [thing.name for thing in scene if w.fits(thing.colour, thing.shape)]
            said.append(f"{' , '.join(names) or 'none'} : {len(names)}")
            counts.append(str(len(names)))
        if len(counts) > 1:
            said.append(f"{' + '.join(counts)} = {total}")
        return " ; ".join(said)

    question = " plus ".join(f"how many {w.words}" for w in wanted) + "?"
    return _Ask(question, str(total), compose, explain)


def _colour(draw: random.Random) -> _Ask:
    colour, shape = draw.choice(_TYPES)

    def compose(draw: random.Random) -> list[Thing]:
        others = [kind for kind in _TYPES if kind[1] != shape]
        more = draw.choices(others, k=draw.randint(*THINGS) - 1)
        return _placed([(colour, shape), *more], draw)

    def explain(scene: list[Thing]) -> str:
        return f"{colour} {shape} : {colour}"

    return _Ask(f"what colour is the {shape}?", colour, compose, explain)


def _position(draw: random.Random) -> _Ask:
    asked, other = draw.sample(_TYPES, 2)
    answer = draw.choice(("left", "right", "above", "below"))

    def compose(draw: random.Random) -> list[Thing]:
        along = COLUMNS if answer in ("left", "right") else ROWS
        first, second = sorted(draw.sample(range(len(along)), 2))
        if answer in ("right", "below"):
            first, second = second, first
        line = draw.randrange(len(ROWS))
        pair = (
            [(line, first), (line, second)] if along is COLUMNS else [(first, line), (second, line)]
        )
        fixed = [(ROWS[row], COLUMNS[column]) for row, column in pair]
        rest = [kind for kind in _TYPES if kind not in (asked, other)]
        more = draw.choices(rest, k=draw.randint(*THINGS) - 2)
        return _placed([asked, other, *more], draw, fixed)

    def explain(scene: list[Thing]) -> str:
        [one] = [" ".join(t) for t in scene if (t.colour, t.shape) == asked]
        [two] = [" ".join(t) for t in scene if (t.colour, t.shape) == other]
        return f"{one} , {two} : {answer}"

    question = f"where is the {' '.join(asked)} from the {' '.join(other)}?"
    return _Ask(question, answer, compose, explain)


def _placed(
    kinds: Sequence[tuple[str, str]],
    draw: random.Random,
    fixed: Sequence[tuple[str, str]] = (),
) -> list[Thing]:
    """Things of these kinds in cells of their own, the first of them in those that are fixed."""
    free = [place for place in _PLACES if place not in fixed]
    places = [*fixed, *draw.sample(free, len(kinds) - len(fixed))]
    return [Thing(*kind, *place) for kind, place in zip(kinds, places, strict=True)]


_ASKS: dict[Kind, Callable[[random.Random], _Ask]] = {
    "count": _count,
    "colour": _colour,
    "position": _position,
    "sum": _sum,
}
