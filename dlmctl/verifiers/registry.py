"""Verifiers by name, the tasks that they belong to, and the stage `verify`.

A verifier is a function of a record that returns a Verdict (or a number, or a number and a dict).
Others come as `module:function`, or by name from packages that register one under the entry-point
group `dlmctl.verifiers`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import OnError, Record, each
from dlmctl.verifiers.answer import Verdict, judged
from dlmctl.verifiers.evaluations import from_evaluation
from dlmctl.verifiers.limits import Alarm, TookTooLongError, Worker, overrun
from dlmctl.verifiers.shaped import PRESETS

Verifier = Callable[[Mapping[str, Any]], Any]

VERIFIERS = {
    "sudoku": "dlmctl.verifiers.sudoku:sudoku",
    "sudoku-units": "dlmctl.verifiers.sudoku:sudoku_units",
    "sudoku-cells": "dlmctl.verifiers.sudoku:sudoku_cells",
    "countdown": "dlmctl.verifiers.countdown:countdown",
    "countdown-shaped": "dlmctl.verifiers.shaped:countdown_shaped",
    "concepts": "dlmctl.verifiers.concepts:concepts",
    "vqa": "dlmctl.verifiers.vqa:vqa",
    "layout": "dlmctl.verifiers.perception:layout",
    "grounding": "dlmctl.verifiers.perception:grounding",
    "gsm8k": "dlmctl.verifiers.numeric:gsm8k",
    "math": "dlmctl.verifiers.mathematics:math",
    "code": "dlmctl.verifiers.code:code",
    "format": "dlmctl.verifiers.texts:tags",
    "choice": "dlmctl.verifiers.texts:choice",
    "exact": "dlmctl.verifiers.texts:exact",
    "tags-count": "dlmctl.verifiers.shaped:tags_count",
    "tags-soft": "dlmctl.verifiers.shaped:tags_soft",
    "tags-strict": "dlmctl.verifiers.shaped:tags_strict",
    "boxed-tags": "dlmctl.verifiers.shaped:boxed_tags",
    "integer": "dlmctl.verifiers.shaped:integer",
}
SAME_TASK = {
    "math500": "math",
    "math-500": "math",
    "hendrycks_math": "math",
    "math_dapo": "math",
    "canaries": "exact",
    "humaneval": "code",
    "openai_humaneval": "code",
    "mbpp": "code",
    "geometry3k": "vqa",
    "virl39k": "vqa",
}
TASKS = {"shapes": {"vqa": 0.9, "layout": 0.1, "grounding": 0.0}}
"""Tasks that are judged by more than the verifier of their name, with the weights; 0 is measured
and not rewarded."""


def verify(
    records: Iterable[Record],
    verifiers: list[str] | None = None,
    weights: Mapping[str, float] | None = None,
    preset: str | None = None,
    extra: Mapping[str, Verifier] | None = None,
    adapted: Mapping[str, Verifier] | None = None,
    on_error: OnError = "fail",
    time_limit: float | None = None,
    used: set[str] | None = None,
) -> Iterator[Record]:
    """Add `rewards`, `reward` and `verdict` to every record.

    Args:
        verifiers: names; None goes by the record's task.
        weights: factors of the rewards in their sum, 1 where not named.
        preset: name of a table of verifiers and weights for each task.
        extra: further verifiers, applied to every record under these names.
        adapted: verifiers to be used instead of those of these names; they limit their own time.
        time_limit: seconds for one verdict, after which it is 0, and functions that are not of
            this package run in a process of their own. None: no limit.
        used: verifiers that have judged records before; those that judge are added.

    Raises:
        UsageError: a verifier or preset that does not exist, a weight of one that is not used.
    """
    weights, extra = dict(weights or {}), dict(extra or {})
    own = {**(adapted or {}), **extra}
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"no preset '{preset}'; there is {', '.join(PRESETS)}")
    used = set() if used is None else used
    workers: dict[str, Worker] = {}
    alarm = Alarm(time_limit)

    def asked(name: str, record: Record) -> Verdict:
        if name in own:
            return ask(own[name], record)
        if name in VERIFIERS or time_limit is None:
            try:
                with alarm:
                    return ask(find_verifier(name), record)
            except TookTooLongError:
                return overrun(time_limit or 0.0)
        if name not in workers:
            workers[name] = Worker(name, time_limit)
        return workers[name](record)

    def judge(row: Record) -> Record:
        record = from_evaluation(row)
        chosen: dict[str, float] = {}
        if verifiers or extra:
            chosen = dict.fromkeys([*(verifiers or []), *extra], 1.0)
        else:
            chosen = _for_task(record, preset)
        chosen = {name: weights.get(name, weight) for name, weight in chosen.items()}
        used.update(chosen)
        if "ground_truth" in row and row["ground_truth"] is None:
            # Two rows of d1's GSM8K files; its evaluation counts them as wrong, too.
            nothing = judged(False, "the file has no ground truth for it")
            return _judged(record, dict.fromkeys(chosen, nothing), chosen)
        verdicts = {name: asked(name, record) for name in chosen}
        return _judged(record, verdicts, chosen)

    try:
        for name in verifiers or []:
            if name in VERIFIERS or time_limit is None:
                find_verifier(name)
            else:
                workers[name] = Worker(name, time_limit)
        yield from each(records, judge, on_error)
    finally:
        alarm.close()
        for worker in workers.values():
            worker.close()
    if unused := set(weights) - used:
        raise UsageError(f"--weight names {', '.join(sorted(unused))}, which judged nothing")


def _judged(record: Record, verdicts: dict[str, Verdict], weights: dict[str, float]) -> Record:
    done = Record(record)
    done.where = record.where
    done["rewards"] = {name: verdict.reward for name, verdict in verdicts.items()}
    done["reward"] = sum(weights[name] * verdict.reward for name, verdict in verdicts.items())
    done["verdict"] = {name: verdict.detail for name, verdict in verdicts.items()}
    return done


def _for_task(record: Record, preset: str | None) -> dict[str, float]:
    """The verifiers of a record by its task."""
    task = str(record.get("task") or "").lower()
    task = SAME_TASK.get(task, task)
    if preset is not None:
        if task not in PRESETS[preset]:
            raise DataError(f"preset {preset} has nothing for task '{task}'", record.where)
        return PRESETS[preset][task]
    if task in TASKS:
        return TASKS[task]
    # A record names what is installed; module:function is for the command line alone, since it
    # would let data choose what is imported and run.
    if task not in VERIFIERS and task not in _installed():
        raise DataError(
            f"no verifier for task '{task[:80]}': choose one with --verifier "
            f"({', '.join(VERIFIERS)}, module:function)",
            record.where,
        )
    return {task: 1.0}


@cache
def _installed() -> dict[str, EntryPoint]:
    """The verifiers of other packages by name."""
    return {entry.name: entry for entry in entry_points(group="dlmctl.verifiers")}


@cache
def find_verifier(name: str) -> Verifier:
    """The verifier of that name, or of `module:function`; raises UsageError."""
    target = VERIFIERS.get(name)
    if target is None:
        if name in _installed():
            return _installed()[name].load()
        target = name
    module, found, function = target.partition(":")
    if not found:
        raise UsageError(
            f"no verifier '{name}'; there are {', '.join(VERIFIERS)}, and module:function"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError, RecursionError) as error:
        # The last three are import_module's for what is no name of a module.
        raise UsageError(f"verifier {name} cannot be loaded ({error})") from None


def ask(verifier: Verifier, record: Record) -> Verdict:
    """What a verifier says, as a Verdict; raises DataError where it is none."""
    answer = verifier(record)
    if isinstance(answer, Verdict):
        return answer
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        return Verdict(float(answer[0]), answer[1])
    if isinstance(answer, (int, float)):
        return Verdict(float(answer), {})
    raise DataError(f"the verifier returned {answer!r}; expected a number or (number, dict)")
