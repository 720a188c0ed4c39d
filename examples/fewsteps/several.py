"""Sudokus of 4 x 4 that have several solutions, and how completions spread over these.

    python3 several.py puzzles COUNT SEED HOLES     records with one of the solutions as completion
    python3 several.py judge < VERIFIED             one line for each puzzle

All 288 grids are known. `valid` is the share of a puzzle's completions that are right, `spread` the
number of different solutions among the right ones, in units of what as many uniform draws from all
solutions have on average; a puzzle without a right completion has none.
"""

import itertools
import json
import random
import sys

CELLS = range(16)
BOXES = [[4 * (r + i) + c + j for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
UNITS = [
    *([4 * r + c for c in range(4)] for r in range(4)),
    *([4 * r + c for r in range(4)] for c in range(4)),
    *BOXES,
]
ROWS = ["".join(row) for row in itertools.permutations("1234")]
GRIDS = [
    grid
    for grid in map("".join, itertools.product(ROWS, repeat=4))
    if all(len({grid[cell] for cell in unit}) == 4 for unit in UNITS)
]


def solutions(puzzle: str) -> list[str]:
    given = [cell for cell in CELLS if puzzle[cell] != "0"]
    return [grid for grid in GRIDS if all(grid[cell] == puzzle[cell] for cell in given)]


def puzzles(count: int, seed: int, holes: int) -> None:
    draw = random.Random(seed)
    for number in range(count):
        puzzle, right = "", [""]
        while len(right) == 1:
            grid, empty = draw.choice(GRIDS), set(draw.sample(CELLS, holes))
            puzzle = "".join("0" if cell in empty else grid[cell] for cell in CELLS)
            right = solutions(puzzle)
        grid = draw.choice(right)
        record = {
            "id": f"several/{number}",
            "task": "sudoku",
            "prompt": puzzle + "=",
            "puzzle": puzzle,
        }
        print(json.dumps(record | {"solution": grid, "completion": grid}))


def judge() -> None:
    records = map(json.loads, sys.stdin)
    for _, group in itertools.groupby(records, key=lambda record: record["id"]):
        samples = list(group)
        right = [sample["completion"] for sample in samples if sample["reward"] == 1]
        there = len(solutions(samples[0]["puzzle"]))
        expected = there * (1 - (1 - 1 / there) ** len(right))
        spread = len(set(right)) / expected if right else None
        passes = sum(sample["rollout"]["nfe"] for sample in samples) / len(samples)
        row = {"valid": len(right) / len(samples), "passes": passes}
        print(json.dumps(row | ({} if spread is None else {"spread": spread})))


if __name__ == "__main__":
    if sys.argv[1] == "puzzles":
        puzzles(*map(int, sys.argv[2:]))
    else:
        judge()
