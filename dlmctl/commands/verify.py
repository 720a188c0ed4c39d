"""`dlmctl verify`: options and wiring of the stage."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Annotated, Literal

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import (
    Files,
    OnErrorOption,
    Output,
    PerceptionTag,
    Quiet,
    ReasoningTag,
    ResumeOption,
    ShardOption,
    tag_names,
)
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import each, write_records
from dlmctl.records.resume import Resume, Rule
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.settings.parsing import byte_count
from dlmctl.tasks.layout import TAGS


def command(
    files: Files = None,
    verifier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="by the record's task",
            help="sudoku, sudoku-units, sudoku-cells, countdown, concepts, vqa, layout, grounding, "
            "gsm8k, math, code, format, choice, exact, another of a preset, or your own as "
            "module:function; repeatable.",
        ),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT", help="Weight of a verifier in 'reward' (default 1); repeatable."
        ),
    ] = None,
    preset: Annotated[
        Literal["d1"] | None,
        typer.Option(
            show_default="none", help="d1: the shaped rewards of d1 for each task, mended."
        ),
    ] = None,
    program: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="COMMAND",
            show_default="none",
            help="Your own program: reads a record per line, writes for each a line with a number, "
            'or {"reward": number, ...}, and flushes it.',
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            min=0.1,
            help="Seconds that a verifier may take for one record; one that takes longer gives 0, "
            "and --exec fails.",
        ),
    ] = 10.0,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            show_default="none for --exec, 1G for code",
            help="Address space of each process of --exec and code, as 512M or 4G.",
        ),
    ] = None,
    allow_unconfined: Annotated[
        bool,
        typer.Option(
            "--allow-unconfined",
            help="Run what code tests also where the kernel cannot keep it from files, network and "
            "processes.",
        ),
    ] = False,
    perception_tag: PerceptionTag = TAGS.perception,
    reasoning_tag: ReasoningTag = TAGS.reasoning,
    shard: ShardOption = None,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
    resume: ResumeOption = False,
) -> None:
    """Give each completion its rewards.

    Reads records with `completion` and the fields of their task, and adds `rewards` (one number
    for each verifier), `reward` (their weighted sum) and `verdict` (what was extracted, and why).
    The evaluation files of d1 (`generation`, `ground_truth`) are read as they are.

    sudoku: 1 if the grid is right by the rules. sudoku-units: share of rows, columns and boxes that
    are right. sudoku-cells: share of the empty cells that equal the stored solution.

    vqa: 1 if a short answer about an image matches one of `answers`, or `answer`. layout: 1 if the
    completion is <description>...</description> <think>...</think> and a box. grounding: F1 of the
    things in the description against `scene`. Records of shapes get 0.9 vqa + 0.1 layout, and
    grounding without weight.

    code: 1 if Python passes its unit tests: `tests` (a list of assertions, or Python), or the
    fields of HumanEval and MBPP. It runs in a process of its own with limits on time and memory;
    on Linux the kernel lets it read the standard library alone, write no file, and keeps it from
    network and other processes, and where it cannot, code is not run without --allow-unconfined.
    This does not protect from faults of the kernel, nor from code that means to deceive its tests,
    which run in the same interpreter.

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl stats

    dlmctl verify --verifier math --verifier format --weight format=0.2 samples.jsonl

    dlmctl verify --verifier mychecks:polite samples.jsonl

    dlmctl verify --exec ./check samples.jsonl
    """
    from dlmctl.verifiers import perception
    from dlmctl.verifiers.code import MEMORY_LIMIT, code
    from dlmctl.verifiers.evaluations import from_evaluation
    from dlmctl.verifiers.mathematics import math
    from dlmctl.verifiers.program import Program
    from dlmctl.verifiers.registry import find_verifier, verify
    from dlmctl.verifiers.vqa import vqa

    if preset and (verifier or program):
        raise UsageError("--preset chooses the verifiers: leave out --verifier and --exec")
    part = parse_shard(shard)
    total = input_lines(files).times(1 / part.count if part else 1)
    source = read_shard(files or [], part, on_error)
    going = Resume(output, resume)
    if going.done:
        return
    # Where `python -m` would look too: module:function next to the data.
    sys.path.insert(0, os.getcwd())
    memory = byte_count("--memory-limit", memory_limit) if memory_limit else None
    judge = Program(program, time_limit, memory) if program else None
    extra = {"exec": judge} if judge else {}
    tags = tag_names(perception_tag, reasoning_tag)
    adapted = {
        "layout": partial(perception.layout, tags=tags),
        "grounding": partial(perception.grounding, tags=tags),
        "code": partial(
            code,
            time_limit=time_limit,
            memory=MEMORY_LIMIT if memory is None else memory,
            unconfined=allow_unconfined,
        ),
        "math": partial(math, time_limit=time_limit),
        "vqa": partial(vqa, time_limit=time_limit),
    }
    weights = dict(_weight(text) for text in weight or [])
    used: set[str] = set()
    if part is not None:  # what a weight is of may be in another one
        for name in weights.keys() - extra.keys():
            find_verifier(name)
        used.update(weights)
    records = going.rest(
        each(source, from_evaluation, on_error),
        Rule(frozenset({"rewards", "reward", "verdict"}), skips=on_error == "skip"),
        note=lambda line: used.update(line.get("rewards") or {}),
    )
    verified = verify(
        records, verifier, weights, preset, extra, adapted, on_error, time_limit, used
    )
    try:
        shown = counted(verified, "records", quiet, total, going.lines)
        write_records(shown, output, going)
    finally:
        if judge:
            judge.close()


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"--weight {text} is not NAME=NUMBER") from None
