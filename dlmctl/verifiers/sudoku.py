"""Verifiers of 4x4 Sudoku: by the rules, and cell by cell against the stored solution.

A puzzle may have several solutions (a quarter of d1's test puzzles do), so that comparing with one
stored grid marks right answers wrong; and counting cells rewards answers that overwrite clues.
`sudoku` goes by the rules and reports both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, required
from dlmctl.verifiers.typography import plain

UNITS: tuple[tuple[int, ...], ...] = (
    *(tuple(range(4 * r, 4 * r + 4)) for r in range(4)),
    *(tuple(range(c, 16, 4)) for c in range(4)),
    *(tuple(8 * (b // 2) + 2 * (b % 2) + i for i in (0, 1, 4, 5)) for b in range(4)),
)
"""Cells of the rows, the columns and the boxes."""

GRID_IN_PROSE = re.compile(r"(?<!\d)[0-4](?:[\s|,;+\-\[\]]*[0-4]){15}(?!\d)")


class Reading(NamedTuple):
    """The puzzle, and the grid in a completion."""

    puzzle: str
    solution: str | None
    grid: str | None
    """16 digits; None if the completion has another number."""
    cells: str
    """All digits of the completion, padded with 0 or cut to 16, for the count of cells."""
    why: str


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
    """Share of the 12 rows, columns and boxes that contain 1 to 4; 0 unless the clues are kept.

    A denser signal than `sudoku` that also goes by the rules, and is 1 exactly if `sudoku` is.
    """
    reading = _read(record)
    wrong = _broken(reading)
    if reading.grid is None or not _keeps_clues(reading):
        return Verdict(0.0, {"correct": False, "grid": reading.grid, "why": wrong})
    good = sum(len({reading.grid[c] for c in unit} & set("1234")) == 4 for unit in UNITS)
    return Verdict(good / len(UNITS), {"correct": not wrong, "units": good, "grid": reading.grid})


def _read(record: Mapping[str, Any]) -> Reading:
    puzzle = str(required(record, "puzzle"))
    if not re.fullmatch(r"[0-4]{16}", puzzle):
        raise DataError(f"puzzle {puzzle!r} is not 16 digits from 0 to 4")
    solution = None if record.get("solution") is None else str(record["solution"])
    if solution is not None and not re.fullmatch(r"[1-4]{16}", solution):
        raise DataError(f"solution {solution!r} is not 16 digits from 1 to 4")
    text, place = answer_text(completion_text(record))
    text = plain(text)
    if place == "text":
        # Prose has other digits too: take the last run that can be a grid.
        runs = GRID_IN_PROSE.findall(text)
        text = runs[-1] if runs else text
    digits = re.sub(r"\D", "", text)
    why = "" if len(digits) == 16 else f"{len(digits)} digits found, expected 16"
    return Reading(puzzle, solution, digits if not why else None, digits.ljust(16, "0")[:16], why)


def _broken(reading: Reading) -> str:
    """The first broken rule; empty if there is none."""
    if reading.grid is None:
        return reading.why
    if not _keeps_clues(reading):
        return "a clue was changed"
    for number, unit in enumerate(UNITS):
        if {reading.grid[c] for c in unit} != set("1234"):
            kind = ("row", "column", "box")[number // 4]
            return f"{kind} {number % 4 + 1} does not hold 1 to 4"
    return ""


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
