"""4x4 Sudoku: all grids, puzzles with a unique solution, and splits that share no solution grid.

There are 288 grids. Their digests fix for good which of them belong to training (200 train, 88
test), so that a model never saw the solution of a test puzzle, whatever the seed. The proportions
are those of SPG (arXiv 2510.09541), whose own list is not used.

A puzzle is 16 digits, row by row, with 0 for an empty cell.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from itertools import permutations
from typing import Any

from dlmctl.settings.prompts import Prompts, Split, Style
from dlmctl.tasks.wording import sudoku_prompt

TRAIN_GRIDS = 200


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task sudoku."""
    for puzzle, solution in puzzles(settings.split, settings.hole_range, seed):
        answer = {"completion": solution} if settings.completions else {}
        yield {**fields(puzzle, solution, settings.style), **answer}


def fields(puzzle: str, solution: str | None, style: Style) -> dict[str, Any]:
    """The record of a puzzle; `solution` may be unknown."""
    prompt = sudoku_prompt(puzzle, style)
    record = {"id": f"sudoku/{puzzle}", "task": "sudoku", "prompt": prompt, "puzzle": puzzle}
    return record if solution is None else {**record, "solution": solution}


@cache
def all_grids() -> tuple[str, ...]:
    """The 288 solved grids, in lexical order."""
    rows = ["".join(p) for p in permutations("1234")]

    def extend(grid: list[str]) -> Iterator[list[str]]:
        if len(grid) == 4:
            yield grid
            return
        for row in rows:
            if all(row[c] != above[c] for above in grid for c in range(4)) and (
                len(grid) % 2 == 0 or _boxes_differ(grid[-1], row)
            ):
                yield from extend([*grid, row])

    return tuple("".join(grid) for grid in extend([]))


def _boxes_differ(upper: str, lower: str) -> bool:
    return not (set(upper[:2]) & set(lower[:2]) or set(upper[2:]) & set(lower[2:]))


@cache
def split_grids(split: Split) -> tuple[str, ...]:
    """The grids of a split."""
    shuffled = sorted(all_grids(), key=lambda grid: blake2b(grid.encode()).digest())
    return tuple(shuffled[:TRAIN_GRIDS] if split == "train" else shuffled[TRAIN_GRIDS:])


@cache
def _grids_with() -> dict[tuple[int, str], int]:
    """For each (cell, digit) the grids that have the digit there, one bit per grid."""
    sets: dict[tuple[int, str], int] = {}
    for number, grid in enumerate(all_grids()):
        for place in enumerate(grid):
            sets[place] = sets.get(place, 0) | 1 << number
    return sets


def solutions(puzzle: str) -> list[str]:
    """Every grid that agrees with the clues of a puzzle."""
    left = (1 << len(all_grids())) - 1
    for place in enumerate(puzzle):
        if place[1] != "0":
            left &= _grids_with().get(place, 0)
    return [grid for number, grid in enumerate(all_grids()) if left >> number & 1]


def puzzles(
    split: Split = "train", holes: tuple[int, int] = (8, 8), seed: int = 0
) -> Iterator[tuple[str, str]]:
    """An endless stream of (puzzle, solution); the solution is unique.

    Args:
        holes: fewest and most empty cells; each puzzle draws its number.
    """
    draw = random.Random(f"sudoku/{split}/{seed}")
    grids = split_grids(split)
    while True:
        grid, wanted = draw.choice(grids), draw.randint(*holes)
        if puzzle := _dig(grid, wanted, draw):
            yield puzzle, grid


def _dig(grid: str, holes: int, draw: random.Random) -> str | None:
    """Empty cells in random order as long as the solution stays unique; None in a dead end."""
    cells = list(grid)
    for cell in draw.sample(range(16), 16):
        if holes == 0:
            break
        cells[cell] = "0"
        if len(solutions("".join(cells))) == 1:
            holes -= 1
        else:
            cells[cell] = grid[cell]
    return "".join(cells) if holes == 0 else None
