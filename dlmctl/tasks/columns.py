"""Rows of published data sets as records, recognised by their columns.

    prompt or messages                      a record already (also TRL's, plain and conversational)
    prompt, data_source, reward_model       verl
    Puzzle, Solution                        Sudoku, 16, 36 or 81 digits      (d1's benchmark file)
    input "30,100,93", output "23"          Countdown                        (d1's benchmark file)
    nums or numbers, target                 Countdown                        (Jiayi-Pan, TinyZero)
    problem or question, images or image    EasyR1, Geometry3K, ViRL39K, VQA: task vqa
    question, answer with "####"            GSM8K
    problem, answer or solution             MATH
    question                                anything else

`--map prompt=question` names columns by hand and takes precedence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, located
from dlmctl.settings.prompts import Style
from dlmctl.tasks import countdown, sudoku
from dlmctl.tasks.boxes import last_boxed
from dlmctl.tasks.image_columns import with_images
from dlmctl.tasks.images import image_sources
from dlmctl.tasks.wording import question_prompt


def to_record(row: Record, renamed: Mapping[str, str], task: str | None, style: Style) -> Record:
    """A prompt record; it keeps unused columns.

    Args:
        renamed: record field to column of the row.
        task: the task, instead of the one that the columns imply.

    Raises:
        DataError: a mapped column is missing, or no column can be a prompt.
    """
    record = located(row, row.where)
    for name, column in renamed.items():
        if column not in row:
            raise DataError(f"there is no column '{column}'; there are {', '.join(row)}", row.where)
        record[name] = record.pop(column)
    images = image_sources(record)
    recognisers = (_ready, _vision) if images else (_ready, _sudoku, _countdown, _gsm8k, _math)
    for recognise in (*recognisers, _question):
        fields = recognise(record, style)
        if fields is not None:
            if images:
                fields = with_images(fields, images, row.where)
            return _ordered(fields, record, task)
    raise DataError(
        f"no column is a prompt; there are {', '.join(row)}: name it with --map prompt=COLUMN",
        row.where,
    )


def _ordered(fields: dict[str, Any], rest: Record, task: str | None) -> Record:
    """`id`, `task` and the prompt first, then the task's fields, then the other columns."""
    record = located({}, rest.where)
    implied, key = fields.pop("task", None), fields.pop("id", None)
    name = task or implied or rest.get("task") or ("vqa" if "images" in fields else None)
    key = rest.get("id", key)
    if key is None:
        text = repr(fields.get("prompt") or fields.get("messages"))
        text += "".join(fields.get("images", ()))  # several images may have the same question
        key = f"{name or 'prompt'}/{blake2b(text.encode(), digest_size=6).hexdigest()}"
    record["id"] = key if isinstance(key, (str, int)) else str(key)
    if name:
        record["task"] = name
    dropped = fields.pop("drop", ())
    record.update(fields)
    record.update({k: v for k, v in rest.items() if k not in record and k not in dropped})
    return record


def _ready(row: Record, style: Style) -> dict[str, Any] | None:
    if "messages" in row:
        return {"messages": row["messages"]}
    if "prompt" not in row:
        return None
    prompt = row["prompt"]
    name = "messages" if isinstance(prompt, list) else "prompt"
    fields: dict[str, Any] = {name: prompt, "drop": ("prompt",) if name == "messages" else ()}
    truth = row.get("reward_model")
    if isinstance(truth, dict) and "ground_truth" in truth:  # verl
        fields["answer"] = truth["ground_truth"]
        fields["task"] = str(row.get("data_source", "")).rsplit("/", 1)[-1].lower() or None
    return fields


def _sudoku(row: Record, style: Style) -> dict[str, Any] | None:
    puzzle = row.get("Puzzle", row.get("puzzle"))
    solution = row.get("Solution", row.get("solution"))
    if puzzle is None:
        return None
    for name, value in (("puzzle", puzzle), ("solution", solution)):
        if value is not None and sudoku.size_of(str(value)) is None:
            raise DataError(f"{name} {value!r} is {sudoku.NO_GRID}", row.where)
    return {**sudoku.fields(puzzle, solution, style), "drop": ("Puzzle", "Solution")}


def _countdown(row: Record, style: Style) -> dict[str, Any] | None:
    numbers = row.get("numbers", row.get("nums"))
    target = row.get("target")
    if numbers is None and re.fullmatch(r"\d+(\s*,\s*\d+)+", str(row.get("input", ""))):
        numbers, target = str(row["input"]).split(","), row.get("output")
    if numbers is None or target is None:
        return None
    try:
        numbers, target = [int(n) for n in numbers], int(target)
        if max(map(abs, (*numbers, target))) >= 2**63:  # JSON readers refuse it
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        shown = f"numbers {str(numbers)[:80]} and target {str(target)[:80]}"
        raise DataError(f"{shown} are not integers of 64 bits") from None
    return {**countdown.fields(numbers, target, style), "drop": ("nums", "input", "output")}


def _vision(row: Record, style: Style) -> dict[str, Any] | None:
    text = row.get("problem", row.get("question"))
    if not isinstance(text, str):
        return None
    return {"prompt": question_prompt("vqa", text, style), "drop": ("problem", "question")}


def _gsm8k(row: Record, style: Style) -> dict[str, Any] | None:
    answer = row.get("answer")
    if "question" not in row or not isinstance(answer, str) or "####" not in answer:
        return None
    solution, _, final = answer.rpartition("####")
    return {
        "task": "gsm8k",
        "prompt": question_prompt("gsm8k", row["question"], style),
        "answer": final.strip().replace(",", ""),
        "solution": solution.strip(),
        "drop": ("question",),
    }


def _math(row: Record, style: Style) -> dict[str, Any] | None:
    if "problem" not in row or not ("answer" in row or "solution" in row):
        return None
    answer = row.get("answer")
    answer = last_boxed(str(row.get("solution"))) if answer is None else str(answer)
    if answer is None:
        raise DataError(r"no answer column, and the solution has no \boxed{}", row.where)
    prompt = question_prompt("math", row["problem"], style)
    return {"task": "math", "prompt": prompt, "answer": answer, "drop": ("problem",)}


def _question(row: Record, style: Style) -> dict[str, Any] | None:
    if not isinstance(row.get("question"), str):
        return None
    return {"prompt": question_prompt("", row["question"], style), "drop": ("question",)}
