"""Which prompts `prompts` makes or reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob
from dlmctl.settings.parsing import named_text, whole_range

Split = Literal["train", "test"]
Style = Literal["plain", "instruct"]
Kind = Literal["count", "colour", "position", "sum"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Kinds of questions about shapes."""
MOST_THINGS = 6
"""Of a scene; with as many, scenes for an answer are still found quickly."""
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Size of a Sudoku to the rows and columns of its boxes."""
MOST_HOLES = {4: 12, 6: 24, 9: 50}
"""Size to the most empty cells. No 4x4 with fewer than four clues has a unique solution; of the
larger sizes, more empty cells are hardly ever found at random."""
WORDS = 8
"""Most words that a part of a sentence of concepts can express a value with."""

PUZZLES, CONCEPTS, SHAPES, ROWS = "Puzzles", "Concepts", "Shapes", "Files and data sets"


@dataclass(frozen=True)
class Prompts:
    """Options of all sources of prompts, and of some of them."""

    split: Split = knob(
        "train",
        "The splits share no solution grid of Sudoku (200 and 88 of the 288 of 4x4), no problem of "
        "Countdown or arithmetic, no combination of values in a sentence of concepts, no "
        "composition of colours and shapes, and no key of canaries. For a data set: its split.",
    )
    style: Style = knob(
        "plain",
        "plain: the problem alone (what builtin:puzzles knows); instruct: instructions for a chat "
        "model, with the answer in <answer> tags.",
    )
    completions: bool = knob(
        False,
        "Add a right answer as 'completion', for 'dlmctl update --algo sft'; concepts and canaries "
        "always have one.",
        "--completions/--no-completions",
    )
    worked: bool = knob(
        False,
        "Write the completions of Countdown and arithmetic step by step: (95+75)/85=170/85=2, and "
        "85-19=66 for 47+38-19. Not for --style instruct.",
        "--worked/--no-worked",
    )
    size: int = knob(
        4, "Rows of a Sudoku: 4, 6 (boxes of 2 rows and 3 columns) or 9.", panel=PUZZLES
    )
    holes: str = knob(
        "8",
        "Empty cells of a Sudoku, or a range: up to 12 of 4x4, 24 of 6x6, 50 of 9x9.",
        metavar="N or N-M",
        panel=PUZZLES,
    )
    numbers: str = knob(
        "3",
        "Numbers of a problem of Countdown or arithmetic, or a range.",
        metavar="N or N-M",
        panel=PUZZLES,
    )
    words: int = knob(
        WORDS,
        "Words that each part of a sentence can express a value with; with fewer words, a small "
        "model learns sooner which belong together.",
        minimum=1,
        maximum=WORDS,
        panel=CONCEPTS,
    )
    want: list[str] | None = knob(
        None,
        "What 'dlmctl verify' looks for in a text, as in --want sentiment=positive; repeatable.",
        metavar="CONCEPT=VALUE",
        panel=CONCEPTS,
    )
    kind: list[str] | None = knob(
        None,
        "What is asked about an image: count, colour, position or sum; repeatable.",
        metavar="KIND",
        shown_default="all",
        panel=SHAPES,
    )
    things: str = knob(
        "2-5",
        "Things of a scene, from 2 to 6, or a range that ends with at least 3. With fewer than "
        "five the largest answers are left out, which would leave a scene no choice of its split.",
        metavar="N or N-M",
        panel=SHAPES,
    )
    places: bool = knob(
        True,
        "Descriptions say where each thing is. Without places, nothing in them is of no account "
        "for an answer that counts: not with --kind position.",
        "--places/--no-places",
        panel=SHAPES,
    )
    reading: float = knob(
        0.0,
        "Share of the records whose prompt ends with the right description, under the image of "
        "another scene: there is only the reasoning left to do. Trained on, they teach a model to "
        "read its description rather than the image; asked, they show whether it does.",
        metavar="SHARE",
        minimum=0.0,
        maximum=1.0,
        panel=SHAPES,
    )
    cell: int = knob(
        28,
        "Side of a cell in pixels; an image has three by three cells.",
        minimum=14,
        maximum=336,
        panel=SHAPES,
    )
    origin: str | None = knob(
        None,
        "Where gsm8k, math or another SOURCE is read from: a file, a directory or a hub name.",
        "--from",
        metavar="PATH",
        shown_default="the hub",
        panel=ROWS,
    )
    task: str | None = knob(
        None,
        "Task of the rows, by which verify chooses its verifiers.",
        shown_default="from the columns",
        panel=ROWS,
    )
    map: list[str] | None = knob(
        None,
        "Take a field from this column, as in --map prompt=question; repeatable.",
        metavar="FIELD=COLUMN",
        panel=ROWS,
    )

    def __post_init__(self) -> None:
        if self.size not in BOXES:
            raise UsageError(f"--size {self.size}: there are {', '.join(map(str, BOXES))}")
        self.hole_range, self.number_range  # noqa: B018 (they raise, as the others do)
        self.kinds, self.wanted, self.columns, self.thing_range  # noqa: B018
        if not self.places and "position" in self.kinds:
            raise UsageError("--no-places leaves nothing to answer --kind position from")
        if self.worked and not self.completions:
            raise UsageError("--worked is about completions: add --completions")
        if self.worked and self.style == "instruct":
            raise UsageError("--worked is for --style plain: the other asks for tags")

    @cached_property
    def hole_range(self) -> tuple[int, int]:
        """Fewest and most empty cells."""
        return whole_range("--holes", self.holes, 1, MOST_HOLES[self.size])

    @cached_property
    def number_range(self) -> tuple[int, int]:
        """Fewest and most numbers."""
        return whole_range("--numbers", self.numbers, 2, 6)

    @cached_property
    def thing_range(self) -> tuple[int, int]:
        """Fewest and most things of a scene."""
        fewest, most = whole_range("--things", self.things, 2, MOST_THINGS)
        if most < 3:
            raise UsageError(f"--things {self.things}: scenes of two things are all of one split")
        return fewest, most

    @cached_property
    def wanted(self) -> dict[str, str]:
        """Concept to value."""
        return dict(named_text("--want", text, "CONCEPT=VALUE") for text in self.want or ())

    @cached_property
    def kinds(self) -> list[Kind]:
        """The chosen kinds of questions, in the order of `KINDS`."""
        for name in self.kind or ():
            if name not in KINDS:
                raise UsageError(
                    f"--kind {name}: there is no such kind; there are {', '.join(KINDS)}"
                )
        return [kind for kind in KINDS if kind in (self.kind or KINDS)]

    @cached_property
    def columns(self) -> dict[str, str]:
        """Field of a record to the column of a row that it is taken from."""
        return dict(named_text("--map", text, "FIELD=COLUMN") for text in self.map or ())
