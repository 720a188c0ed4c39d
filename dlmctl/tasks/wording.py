"""Prompts of problems: `plain` for models trained on them, `instruct` for chat models.

The instruct prompts ask for the tags that the verifiers read. The wording is our own, so that
numbers are comparable with those of papers only as far as the prompt does not matter.
"""

from __future__ import annotations

from math import isqrt

from dlmctl.settings.prompts import BOXES, Style

TAGS = (
    "Think step by step between <reasoning> and </reasoning>, then give {what} between <answer> "
    "and </answer>."
)
LAYOUT = (
    "Say what the image shows between <description> and </description>{how}, think step by step "
    "between <think> and </think>, then give the answer as \\boxed{{...}}."
)
SUDOKU = (
    "Solve this {size}x{size} Sudoku. Every row, column and {high}x{wide} box holds the digits 1 "
    "to {size} once. The grid is written row by row as {cells} digits, 0 for an empty cell:\n"
    "{puzzle}\n"
)
COUNTDOWN = (
    "Use each of the numbers {numbers} exactly once, with + - * / and parentheses, "
    "to make {target}.\n"
)


def sudoku_prompt(puzzle: str, style: Style) -> str:
    """Plain: `puzzle=`, to be completed with the digits of the solution."""
    if style == "plain":
        return f"{puzzle}="
    size, cells = isqrt(len(puzzle)), len(puzzle)
    high, wide = BOXES[size]
    text = SUDOKU.format(puzzle=puzzle, size=size, high=high, wide=wide, cells=cells)
    return text + TAGS.format(what=f"all {cells} digits of the solved grid")


def countdown_prompt(numbers: list[int], target: int, style: Style) -> str:
    """Plain: `30,100,93:23=`, to be completed with an expression."""
    listed = ",".join(map(str, numbers))
    if style == "plain":
        return f"{listed}:{target}="
    text = COUNTDOWN.format(numbers=listed.replace(",", ", "), target=target)
    return text + TAGS.format(what="the expression alone")


def arithmetic_prompt(expression: str, style: Style) -> str:
    """Plain: `47+38-19=`, to be completed with the value, or with steps that end with it."""
    if style == "plain":
        return f"{expression}="
    return f"What is {expression}?\n" + TAGS.format(what="the result")


def question_prompt(task: str, question: str, style: Style) -> str:
    """Plain: the question as it is."""
    if style == "plain":
        return question
    if task == "vqa":
        return f"{question}\n" + LAYOUT.format(how="")
    what = r"the result as \boxed{...}" if task in ("math", "math500") else "the result"
    return f"{question}\n" + TAGS.format(what=what)


def shapes_prompt(question: str, style: Style) -> str:
    """Plain: `<image> how many red?`."""
    if style == "plain":
        return f"<image> {question}"
    how = (
        ", each thing by colour, shape, row and column, as in 'red circle top left , blue star "
        "middle center'"
    )
    return f"<image> {question}\n" + LAYOUT.format(how=how)
