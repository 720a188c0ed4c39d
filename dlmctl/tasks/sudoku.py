"""Sudoku of 4x4, 6x6 and 9x9 cells: puzzles with a unique solution, splits that share no grid.

Of 4x4 there are 288 grids. Their digests fix for good which of them belong to training (200 train,
88 test), so that a model never saw the solution of a test puzzle, whatever the seed. The
proportions are those of SPG (arXiv 2510.09541), whose own list is not used. Of the larger sizes
grids are drawn at random (not all equally often), and the digest of each decides its split.

A puzzle is written row by row, a digit a cell, with 0 for an empty cell.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from itertools import islice
from math import isqrt
from typing import Any

from dlmctl.settings.prompts import BOXES, Prompts, Split, Style
from dlmctl.tasks.countdown import side_of
from dlmctl.tasks.wording import sudoku_prompt

TRAIN_GRIDS = 200
DIGITS = "0123456789"
NO_GRID = "not 16 digits up to 4, 36 up to 6 or 81 up to 9"
"""What is wrong with a text that has no `size_of`."""


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task sudoku."""
    made = puzzles(settings.split, settings.hole_range, seed, settings.size)
    for puzzle, solution in made:
        answer = {"completion": solution} if settings.completions else {}
        yield {**fields(puzzle, solution, settings.style), **answer}


def fields(puzzle: str, solution: str | None, style: Style) -> dict[str, Any]:
    """The record of a puzzle; `solution` may be unknown."""
    prompt = sudoku_prompt(puzzle, style)
    record = {"id": f"sudoku/{puzzle}", "task": "sudoku", "prompt": prompt, "puzzle": puzzle}
    return record if solution is None else {**record, "solution": solution}


def size_of(grid: str) -> int | None:
    """Rows of a grid written in digits; None if the text is no grid of a known size."""
    size = isqrt(len(grid))
    fits = size in BOXES and size**2 == len(grid) and set(grid) <= set(DIGITS[: size + 1])
    return size if fits else None


@cache
def units(size: int) -> tuple[tuple[int, ...], ...]:
    """Cells of the rows, then of the columns, then of the boxes; `size` of each."""
    high, wide = BOXES[size]
    corners = [(r, c) for r in range(0, size, high) for c in range(0, size, wide)]
    return (
        *(tuple(range(size * r, size * r + size)) for r in range(size)),
        *(tuple(range(c, size**2, size)) for c in range(size)),
        *(
            tuple(size * (top + r) + left + c for r in range(high) for c in range(wide))
            for top, left in corners
        ),
    )


@cache
def _units_of_cells(size: int) -> tuple[tuple[int, ...], ...]:
    """The numbers of the row, the column and the box of each cell."""
    return tuple(
        tuple(number for number, unit in enumerate(units(size)) if cell in unit)
        for cell in range(size**2)
    )


def solutions(puzzle: str, draw: random.Random | None = None) -> Iterator[str]:
    """Every grid that agrees with the clues of a puzzle, one after the other.

    Args:
        draw: shuffles the order in which digits are tried; None tries the lowest first.
    """
    size = isqrt(len(puzzle))
    places = _units_of_cells(size)
    free = [2 ** (size + 1) - 2] * (3 * size)  # of each unit, a bit for each digit not in it
    cells = list(puzzle)

    def fill(empty: list[int]) -> Iterator[str]:
        if not empty:
            yield "".join(cells)
            return
        fewest, choices = size + 1, 0
        for candidate in empty:  # the cell with the fewest digits to try
            row, column, box = places[candidate]
            bits = free[row] & free[column] & free[box]
            if bits.bit_count() < fewest:
                cell, choices, fewest = candidate, bits, bits.bit_count()
                if fewest < 2:
                    break
        rest = [other for other in empty if other != cell]
        digits = [digit for digit in range(1, size + 1) if choices >> digit & 1]
        if draw:
            draw.shuffle(digits)
        for digit in digits:
            cells[cell] = DIGITS[digit]
            for unit in places[cell]:
                free[unit] ^= 1 << digit
            yield from fill(rest)
            for unit in places[cell]:
                free[unit] ^= 1 << digit

    for cell, clue in enumerate(puzzle):
        for unit in places[cell] if clue != "0" else ():
            if not free[unit] >> int(clue) & 1:
                return  # two equal clues in a unit
            free[unit] ^= 1 << int(clue)
    yield from fill([cell for cell, clue in enumerate(puzzle) if clue == "0"])


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 solved grids of 4x4, in lexical order."""
    return tuple(sorted(solutions("0" * 16)))


@cache
def split_grids(split: Split) -> tuple[str, ...]:
    """The grids of 4x4 of a split."""
    shuffled = sorted(all_grids(), key=lambda grid: blake2b(grid.encode()).digest())
    return tuple(shuffled[:TRAIN_GRIDS] if split == "train" else shuffled[TRAIN_GRIDS:])


def puzzles(
    split: Split = "train", holes: tuple[int, int] = (8, 8), seed: int = 0, size: int = 4
) -> Iterator[tuple[str, str]]:
    """An endless stream of (puzzle, solution); the solution is unique.

    Args:
        holes: fewest and most empty cells; each puzzle draws its number.
    """
    draw = random.Random(f"sudoku/{split}/{seed}")
    while True:
        grid, wanted = _grid(size, split, draw), draw.randint(*holes)
        if puzzle := _dig(grid, wanted, draw):
            yield puzzle, grid


def _grid(size: int, split: Split, draw: random.Random) -> str:
    """A random grid of a split."""
    if size == 4:
        return draw.choice(split_grids(split))
    while True:
        grid = next(solutions("0" * size**2, draw))
        if side_of(grid) == split:
            return grid


def _dig(grid: str, holes: int, draw: random.Random) -> str | None:
    """Empty cells in random order as long as the solution stays unique; None in a dead end."""
    cells = list(grid)
    for cell in draw.sample(range(len(grid)), len(grid)):
        if holes == 0:
            break
        cells[cell] = "0"
        if len(list(islice(solutions("".join(cells)), 2))) == 1:
            holes -= 1
        else:
            cells[cell] = grid[cell]
    return "".join(cells) if holes == 0 else None
