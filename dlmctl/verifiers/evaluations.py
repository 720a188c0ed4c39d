"""Rows of d1's evaluation files (`question`, `generation` or `generations`, `ground_truth`).

The prompt of that evaluation ends in `<reasoning>`, which is therefore put in front again.
"""

from __future__ import annotations

import re
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, located


def from_evaluation(row: Record) -> Record:
    """The row with the fields that its task's verifier needs; other records unchanged.

    Raises:
        DataError: the ground truth has not the form of the task.
    """
    text = row.get("generation", row.get("generations"))
    if not isinstance(text, str) or "ground_truth" not in row or "completion" in row:
        return row
    fields = {k: v for k, v in row.items() if k not in ("generation", "generations")}
    fields["completion"] = "<reasoning>" + text
    return located({**fields, **_task_fields(str(row.get("task", "")), row)}, row.where)


def _task_fields(task: str, row: Record) -> dict[str, Any]:
    truth = row["ground_truth"]
    if task == "countdown":
        if not (isinstance(truth, list) and len(truth) == 2 and isinstance(truth[0], list)):
            raise DataError(f"ground_truth {truth!r} is not [numbers, target]", row.where)
        return {"numbers": truth[0], "target": truth[1]}
    if task == "sudoku":
        puzzle = re.search(r"[0-4]{16}", str(row.get("question", "")))
        if puzzle is None:
            raise DataError("no puzzle of 16 digits in 'question'", row.where)
        return {"puzzle": puzzle.group(), "solution": truth}
    return {"answer": truth}
