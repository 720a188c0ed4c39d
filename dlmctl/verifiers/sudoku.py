"""Verifiers of Sudoku of any size: by the rules, and cell by cell against the stored solution.

A puzzle may have several solutions (a quarter of d1's test puzzles do), so that comparing with one
stored grid marks right answers wrong; and counting cells rewards answers that overwrite clues.
`sudoku` goes by the rules and reports both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import isqrt
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError
from dlmctl.tasks.sudoku import DIGITS, NO_GRID, size_of, units
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, required
from dlmctl.verifiers.typography import plain


class Reading(NamedTuple):
    """The puzzle, and the grid in a completion."""

    puzzle: str
    solution: str | None
    grid: str | None
    """A digit for each cell; None if the completion has another number of digits."""
    cells: str
    """All digits of the completion, padded with 0 or cut, for the count of cells."""
    why: str

    @property
    def size(self) -> int:
        """Rows of the puzzle."""
        return isqrt(len(self.puzzle))


def sudoku(record: Mapping[str, Any]) -> Verdict:
    """1 if the whole grid is right by the rules: rows, columns, boxes, clues kept."""
    reading = _read(record)
    wrong = _broken(reading)
    detail = {"correct": not wrong, "rules": not wrong, **_stored(reading), "grid": reading.grid}
    return Verdict(float(not wrong), {**detail, **({"why": wrong} if wrong else {})})


def sudoku_cells(record: Mapping[str, Any]) -> Verdict:
    """Share of the empty cells that equal the stored solution: the reward and metric of d1."""
    reading = _read(record)
    if reading.solution is None:
        raise DataError("field 'solution' is missing; without it cells cannot be compared")
    stored = _stored(reading)
    share = stored["stored"] / stored["empty"] if stored["empty"] else 0.0
    return Verdict(share, {"correct": not _broken(reading), **stored, "grid": reading.grid})


def sudoku_units(record: Mapping[str, Any]) -> Verdict:
    """Share of rows, columns and boxes that contain each digit; 0 unless the clues are kept.

    A denser signal than `sudoku` that also goes by the rules, and is 1 exactly if `sudoku` is.
    """
    reading = _read(record)
    wrong = _broken(reading)
    if reading.grid is None or not _keeps_clues(reading):
        return Verdict(0.0, {"correct": False, "grid": reading.grid, "why": wrong})
    all_units = units(reading.size)
    good = sum(_is_complete(reading.grid, unit) for unit in all_units)
    share = good / len(all_units)
    return Verdict(share, {"correct": not wrong, "units": good, "grid": reading.grid})


def _read(record: Mapping[str, Any]) -> Reading:
    puzzle = str(required(record, "puzzle"))
    size, cells = size_of(puzzle), len(puzzle)
    if size is None:
        raise DataError(f"puzzle {puzzle!r} is {NO_GRID}")
    solution = None if record.get("solution") is None else str(record["solution"])
    if solution is not None and (size_of(solution) != size or "0" in solution):
        raise DataError(f"solution {solution!r} is not {cells} digits from 1 to {size}")
    text, place = answer_text(completion_text(record))
    text = plain(text)
    if place == "text":
        # Prose has other digits too: take the last run that can be a grid.
        runs = _grid_in_prose(size).findall(text)
        text = runs[-1] if runs else text
    digits = re.sub(r"\D", "", text)
    why = "" if len(digits) == cells else f"{len(digits)} digits found, expected {cells}"
    padded = digits.ljust(cells, "0")[:cells]
    return Reading(puzzle, solution, digits if not why else None, padded, why)


@cache
def _grid_in_prose(size: int) -> re.Pattern[str]:
    """As many digits as cells, with no other digit beside them."""
    digit = f"[0-{size}]"
    return re.compile(rf"(?<!\d){digit}(?:[\s|,;+\-\[\]]*{digit}){{{size**2 - 1}}}(?!\d)")


def _broken(reading: Reading) -> str:
    """The first broken rule; empty if there is none."""
    if reading.grid is None:
        return reading.why
    if not _keeps_clues(reading):
        return "a clue was changed"
    size = reading.size
    for number, unit in enumerate(units(size)):
        if not _is_complete(reading.grid, unit):
            kind = ("row", "column", "box")[number // size]
            return f"{kind} {number % size + 1} does not hold 1 to {size}"
    return ""


def _is_complete(grid: str, unit: tuple[int, ...]) -> bool:
    """Whether a row, column or box holds each digit once."""
    return {grid[cell] for cell in unit} == set(DIGITS[1 : len(unit) + 1])


def _keeps_clues(reading: Reading) -> bool:
    grid = reading.grid or ""
    return all(clue in ("0", cell) for clue, cell in zip(reading.puzzle, grid, strict=True))


def _stored(reading: Reading) -> dict[str, Any]:
    """Number of empty cells that equal the stored solution, and of empty cells."""
    empty = [i for i, clue in enumerate(reading.puzzle) if clue == "0"]
    if reading.solution is None:
        return {"empty": len(empty)}
    right = sum(reading.cells[i] == reading.solution[i] for i in empty)
    return {"stored": right, "empty": len(empty)}
