"""Verifiers by name, the tasks that they judge, and the stage `verify`.

A verifier is a function of a record that returns a Verdict (or a number, or a number and a dict).
To add one, write it and put a line into `VERIFIERS`. It may have parameters `time_limit` (seconds;
it then limits its own time), `memory` (bytes), `unconfined` and `tags`, which `verify` fills in.
Other verifiers come as `module:function`, or by name from packages that register one under the
entry-point group `dlmctl.verifiers`. Settings of a single verifier are filled in as well, under the
name of its parameter. One that judges several records at once is a class (see `lookahead`); one
that needs a server or a model stands in their folders, and is named here by its text alone.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Generator, Iterable, Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import OnError, Record, each, located
from dlmctl.settings.layout import Tags
from dlmctl.settings.verify import Judging
from dlmctl.verifiers.answer import Verdict, judged
from dlmctl.verifiers.evaluations import from_evaluation
from dlmctl.verifiers.limits import Alarm, TookTooLongError, Worker, overrun
from dlmctl.verifiers.lookahead import LooksAhead, looked_ahead
from dlmctl.verifiers.program import Program

Verifier = Callable[[Mapping[str, Any]], Any]

VERIFIERS = {
    "sudoku": "dlmctl.verifiers.sudoku:sudoku",
    "sudoku-units": "dlmctl.verifiers.sudoku:sudoku_units",
    "sudoku-cells": "dlmctl.verifiers.sudoku:sudoku_cells",
    "countdown": "dlmctl.verifiers.countdown:countdown",
    "countdown-steps": "dlmctl.verifiers.countdown:countdown_steps",
    "countdown-shaped": "dlmctl.verifiers.shaped:countdown_shaped",
    "concepts": "dlmctl.verifiers.concepts:concepts",
    "vqa": "dlmctl.verifiers.vqa:vqa",
    "layout": "dlmctl.verifiers.perception:layout",
    "grounding": "dlmctl.verifiers.perception:grounding",
    "gsm8k": "dlmctl.verifiers.numeric:gsm8k",
    "math": "dlmctl.verifiers.mathematics:math",
    "code": "dlmctl.verifiers.code:code",
    "format": "dlmctl.verifiers.texts:tags",
    "choice": "dlmctl.verifiers.choices:choice",
    "exact": "dlmctl.verifiers.texts:exact",
    "regex": "dlmctl.verifiers.regexes:regex",
    "json-schema": "dlmctl.verifiers.json_schema:json_schema",
    "judge": "dlmctl.engines.judge:Judge",
    "reward-model": "dlmctl.models.reward_model:RewardModel",
    "tags-count": "dlmctl.verifiers.shaped:tags_count",
    "tags-soft": "dlmctl.verifiers.shaped:tags_soft",
    "tags-strict": "dlmctl.verifiers.shaped:tags_strict",
    "boxed-tags": "dlmctl.verifiers.shaped:boxed_tags",
    "integer": "dlmctl.verifiers.shaped:integer",
}
SAME_TASK = {
    "arithmetic": "gsm8k",
    "math500": "math",
    "math-500": "math",
    "hendrycks_math": "math",
    "math_dapo": "math",
    "canaries": "exact",
    "humaneval": "code",
    "openai_humaneval": "code",
    "mbpp": "code",
    "apps": "code",
    "taco": "code",
    "livecodebench": "code",
    "geometry3k": "vqa",
    "virl39k": "vqa",
}
TASKS = {"shapes": {"vqa": 0.9, "layout": 0.1, "grounding": 0.0}}
"""Tasks with other verifiers than the one of their name, and the weights; a verifier of weight 0 is
recorded, but adds nothing to the reward."""
PRESETS: dict[str, dict[str, dict[str, float]]] = {
    "d1": {
        "gsm8k": {
            "gsm8k": 2.0,
            "tags-count": 1.0,
            "tags-soft": 0.5,
            "tags-strict": 0.5,
            "integer": 0.5,
        },
        "math": {"math": 2.0, "boxed-tags": 1.0},
        "countdown": {"countdown-shaped": 1.0},
        "sudoku": {"sudoku-cells": 1.0},
    }
}
"""Preset and task to verifiers and their weights."""


def verify(
    records: Iterable[Record],
    verifiers: list[str] | None = None,
    judging: Judging = Judging(),
    tags: Tags = Tags(),
    *,
    settings: Mapping[str, Any] | None = None,
    on_error: OnError = "fail",
    used: set[str] | None = None,
) -> Generator[Record, None, None]:
    """Add `rewards`, `reward` and `verdict` to every record.

    A verdict that takes longer than the time limit is 0. Verifiers of other packages run in a
    process of their own, which is stopped when the iterator is closed.

    Args:
        verifiers: names; None goes by the record's task.
        settings: of single verifiers, by the parameter that takes them.
        used: verifiers that have judged records before; those that judge are added.

    Raises:
        UsageError: a verifier or preset does not exist, or a weight is of a verifier that judged
            nothing.
    """
    weights, preset, time_limit = judging.weights, judging.preset, judging.time_limit
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"no preset '{preset}'; there is {', '.join(PRESETS)}")
    filled_in: dict[str, Any] = {
        "time_limit": time_limit,
        "unconfined": judging.allow_unconfined,
        "tags": tags,
    }
    filled_in |= settings or {}
    if judging.memory is not None:
        filled_in["memory"] = judging.memory
    used = set() if used is None else used
    alarm = Alarm(time_limit)
    program = Program(judging.program, time_limit, judging.memory) if judging.program else None
    named = [*(verifiers or ()), *(("exec",) if program else ())]
    workers: list[Worker] = []
    looking: list[LooksAhead] = []

    @cache
    def worker(name: str) -> Worker:
        workers.append(Worker(name, time_limit))
        return workers[-1]

    @cache
    def built_in(name: str) -> tuple[Verifier, bool]:
        """A verifier with its parameters, and whether it limits its own time."""
        verifier = find_verifier(name)
        takes = inspect.signature(verifier).parameters.keys() & filled_in.keys()
        filled = {key: filled_in[key] for key in takes}
        if inspect.isclass(verifier):
            kind: Any = verifier
            looking.append(kind(**filled))
            return looking[-1], True
        return partial(verifier, **filled), "time_limit" in takes

    def verdict(name: str, record: Record) -> Verdict:
        if program and name == "exec":
            return program(record)
        if name not in VERIFIERS:
            return worker(name)(record)
        verifier, limits_itself = built_in(name)
        if limits_itself:
            return ask(verifier, record)
        try:
            with alarm:
                return ask(verifier, record)
        except TookTooLongError:
            return overrun(time_limit)

    def judge(row: Record) -> Record:
        record = from_evaluation(row)
        chosen = dict.fromkeys(named, 1.0) if named else _for_task(record, preset)
        chosen = {name: weights.get(name, weight) for name, weight in chosen.items()}
        used.update(chosen)
        if "ground_truth" in row and row["ground_truth"] is None:
            # Two rows of d1's GSM8K files; its evaluation counts them as wrong, too.
            nothing = judged(False, "the file has no ground truth for it")
            return _with_verdicts(record, dict.fromkeys(chosen, nothing), chosen)
        return _with_verdicts(record, {name: verdict(name, record) for name in chosen}, chosen)

    try:
        for name in verifiers or []:  # before the first record arrives
            if name in VERIFIERS:
                built_in(name)
            else:
                worker(name)
        yield from each(looked_ahead(records, looking), judge, on_error)
    finally:
        alarm.close()
        for process in (program, *workers, *looking):
            if process:
                process.close()
    if unused := set(weights) - used:
        raise UsageError(f"--weight names {', '.join(sorted(unused))}, which judged nothing")


def _with_verdicts(
    record: Record, verdicts: dict[str, Verdict], weights: dict[str, float]
) -> Record:
    written = {
        "rewards": {name: verdict.reward for name, verdict in verdicts.items()},
        "reward": sum(weights[name] * verdict.reward for name, verdict in verdicts.items()),
        "verdict": {name: verdict.detail for name, verdict in verdicts.items()},
    }
    return located({**record, **written}, record.where)


def _for_task(record: Record, preset: str | None) -> dict[str, float]:
    """The verifiers of a record's task, and their weights."""
    task = str(record.get("task") or "").lower()
    task = SAME_TASK.get(task, task)
    if preset is not None:
        if task not in PRESETS[preset]:
            raise DataError(f"preset {preset} has nothing for task '{task}'", record.where)
        return PRESETS[preset][task]
    if task in TASKS:
        return TASKS[task]
    # A record may name what is installed. module:function is for the command line alone: it would
    # let data choose what is imported and run.
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
    module, colon, function = target.partition(":")
    if not colon:
        raise UsageError(
            f"no verifier '{name}'; there are {', '.join(VERIFIERS)}, and module:function"
        )
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError, RecursionError) as error:
        # import_module raises the last three if the text cannot be the name of a module.
        raise UsageError(f"verifier {name} cannot be loaded ({error})") from None


def ask(verifier: Verifier, record: Record) -> Verdict:
    """A verifier's answer as a Verdict; raises DataError if it is none."""
    answer = verifier(record)
    if isinstance(answer, Verdict):
        return answer
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        return Verdict(float(answer[0]), answer[1])
    if isinstance(answer, (int, float)):
        return Verdict(float(answer), {})
    raise DataError(f"the verifier returned {answer!r}; expected a number or (number, dict)")
