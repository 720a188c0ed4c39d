r"""Questions about drawn scenes, with answers that are chosen before the scenes.

    count      how many red circles?                        0 to 4
    sum        how many red plus how many squares?          0 to 6; a red square counts twice
    colour     what colour is the star?                     of the only thing of this shape
    position   where is the blue square from the red star?  left, right, above, below

A question and its answer are drawn uniformly, then a scene that fits them, so that the question
alone reveals nothing: the most frequent answer to it among 8000 train problems is right in 21 % of
4000 test problems (count 21, sum 14, colour 24, position 25).

A right response briefly describes the scene, then repeats what matters:

    <description> red circle top left , blue square top right </description>
    <think> red circle : 1 </think> \boxed{1}
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import product
from typing import Any, NamedTuple

from dlmctl.settings.layout import Tags
from dlmctl.settings.prompts import KINDS, Kind, Prompts, Split
from dlmctl.tasks.drawing import Look, draw_scene
from dlmctl.tasks.images import as_data_uri
from dlmctl.tasks.scenes import COLOURS, COLUMNS, ROWS, SHAPES, Thing, describe, split_of
from dlmctl.tasks.wording import shapes_prompt

THINGS = (2, 5)
"""Fewest and most things of a scene, if nothing else is asked for."""
MOST = {"count": 4, "sum": 6}
"""Largest answer of a kind; the smallest is 0."""
_TYPES = tuple(product(COLOURS, SHAPES))
_PLACES = tuple(product(ROWS, COLUMNS))


class Problem(NamedTuple):
    """A question about a scene."""

    kind: Kind
    question: str
    answer: str
    thought: str
    """The reasoning from the description, in words."""
    scene: list[Thing]
    """In reading order."""
    looks: list[Look]
    places: bool = True
    """Whether a description says where things are."""

    @property
    def told(self) -> list[Thing]:
        """The scene as it is to be described."""
        return self.scene if self.places else [Thing(t.colour, t.shape) for t in self.scene]

    @property
    def digest(self) -> str:
        """Digest of the question and of everything that is drawn."""
        text = repr((self.question, self.scene, self.looks))
        return blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def described_and_answered(self) -> tuple[str, str]:
        """The two halves of a right response: what is seen, and what follows from it."""
        tags = Tags()
        seen, thought = tags.perception, tags.reasoning
        return (
            f"<{seen}> {describe(self.told)} </{seen}>",
            f"<{thought}> {self.thought} </{thought}> \\boxed{{{self.answer}}}",
        )

    @property
    def completion(self) -> str:
        """A right response."""
        return " ".join(self.described_and_answered)


class _Wanted(NamedTuple):
    """Things to count: of a colour, of a shape, or of both."""

    colour: str = ""
    shape: str = ""

    def fits(self, colour: str, shape: str) -> bool:
        return self.colour in ("", colour) and self.shape in ("", shape)

    @property
    def words(self) -> str:
        return " ".join(filter(None, (self.colour, self.shape and self.shape + "s")))


class _Ask(NamedTuple):
    """A question and its answer, with functions that compose and explain scenes for it."""

    question: str
    answer: str
    compose: Callable[[random.Random], list[Thing]]
    explain: Callable[[list[Thing]], str]


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task shapes; a share of them are to be read only."""
    draw = random.Random(f"shapes/{settings.split}/{seed}/reading")
    others = problems(settings.split, f"{seed}/others", settings.kinds, settings.thing_range)
    made = problems(settings.split, seed, settings.kinds, settings.thing_range)
    for problem in (p._replace(places=settings.places) for p in made):
        reads = draw.random() < settings.reading
        shown = next(others) if reads else problem
        prompt = shapes_prompt(problem.question, settings.style)
        description, rest = problem.described_and_answered
        completion = rest if reads else f"{description} {rest}"
        yield {
            "id": f"shapes/{problem.digest}" + ("/reading" if reads else ""),
            "task": "shapes",
            "kind": problem.kind,
            "images": [as_data_uri(draw_scene(shown.scene, shown.looks, settings.cell))],
            "prompt": f"{prompt} {description}" if reads else prompt,
            "scene": [_fields(thing) for thing in problem.told],
            "answer": problem.answer,
            **({"completion": completion} if settings.completions else {}),
        }


def _fields(thing: Thing) -> dict[str, str]:
    """What is said of it."""
    return {name: word for name, word in thing._asdict().items() if word}


def problems(
    split: Split = "train",
    seed: int | str = 0,
    kinds: Sequence[Kind] = KINDS,
    things: tuple[int, int] = THINGS,
) -> Iterator[Problem]:
    """An endless stream of problems, with equal shares of these kinds.

    Args:
        things: fewest and most things of a scene.
    """
    draw = random.Random(f"shapes/{split}/{seed}")
    while True:
        kind = draw.choice(kinds)
        ask = _ASKS[kind](draw, things)
        scene: list[Thing] = []
        while not scene or split_of((t.colour, t.shape) for t in scene) != split:
            scene = sorted(ask.compose(draw), key=lambda t: _PLACES.index((t.row, t.column)))
        looks = [Look(draw.random(), draw.random(), draw.random()) for _ in scene]
        yield Problem(kind, ask.question, ask.answer, ask.explain(scene), scene, looks)


def _count(draw: random.Random, things: tuple[int, int]) -> _Ask:
    form = draw.choice(("colour", "shape", "both"))
    colour = "" if form == "shape" else draw.choice(COLOURS)
    shape = "" if form == "colour" else draw.choice(SHAPES)
    most = min(MOST["count"], things[1] - 1)
    return _amount([_Wanted(colour, shape)], draw.randint(0, most), things)


def _sum(draw: random.Random, things: tuple[int, int]) -> _Ask:
    wanted = [_Wanted(colour=draw.choice(COLOURS)), _Wanted(shape=draw.choice(SHAPES))]
    draw.shuffle(wanted)
    most = min(MOST["sum"], 2 * things[1] - 2)
    return _amount(wanted, draw.randint(0, most), things)


def _amount(wanted: list[_Wanted], total: int, things: tuple[int, int]) -> _Ask:
    """How many things are wanted, added up."""
    worth = {kind: sum(w.fits(*kind) for w in wanted) for kind in _TYPES}
    fewest = max(things[0], -(-total // max(worth.values())))

    def compose(draw: random.Random) -> list[Thing]:
        number, shares = draw.randint(fewest, things[1]), [-1]
        while sum(shares) != total:
            shares = draw.choices(sorted(set(worth.values())), k=number)
        return _placed([draw.choice([k for k in _TYPES if worth[k] == s]) for s in shares], draw)

    def explain(scene: list[Thing]) -> str:
        parts, counts = [], []
        for w in wanted:
            names = [thing.name for thing in scene if w.fits(thing.colour, thing.shape)]
            parts.append(f"{' , '.join(names) or 'none'} : {len(names)}")
            counts.append(str(len(names)))
        if len(counts) > 1:
            parts.append(f"{' + '.join(counts)} = {total}")
        return " ; ".join(parts)

    question = " plus ".join(f"how many {w.words}" for w in wanted) + "?"
    return _Ask(question, str(total), compose, explain)


def _colour(draw: random.Random, things: tuple[int, int]) -> _Ask:
    colour, shape = draw.choice(_TYPES)

    def compose(draw: random.Random) -> list[Thing]:
        others = [kind for kind in _TYPES if kind[1] != shape]
        more = draw.choices(others, k=draw.randint(*things) - 1)
        return _placed([(colour, shape), *more], draw)

    def explain(scene: list[Thing]) -> str:
        return f"{colour} {shape} : {colour}"

    return _Ask(f"what colour is the {shape}?", colour, compose, explain)


def _position(draw: random.Random, things: tuple[int, int]) -> _Ask:
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
        more = draw.choices(rest, k=draw.randint(*things) - 2)
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
    """Things of these kinds in separate cells, the first of them in the fixed ones."""
    free = [place for place in _PLACES if place not in fixed]
    places = [*fixed, *draw.sample(free, len(kinds) - len(fixed))]
    return [Thing(*kind, *place) for kind, place in zip(kinds, places, strict=True)]


_ASKS: dict[Kind, Callable[[random.Random, tuple[int, int]], _Ask]] = {
    "count": _count,
    "colour": _colour,
    "position": _position,
    "sum": _sum,
}
