"""`dlmctl verify`: options and wiring of the stage."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import Annotated, Literal

import typer

from dlmctl.commands.options import (
    Files,
    OnErrorOption,
    Output,
    PerceptionTag,
    Quiet,
    ReasoningTag,
    ShardOption,
    tag_names,
)
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.records.shards import parse_shard, read_shard
from dlmctl.tasks.layout import TAGS


def command(
    files: Files = None,
    verifier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default="by the record's task",
            help="sudoku, sudoku-units, sudoku-cells, countdown, concepts, vqa, layout, grounding, "
            "gsm8k, math, format, choice, exact, another of a preset, or your own as "
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
        float, typer.Option(min=0.1, help="Seconds that --exec may take for one record.")
    ] = 10.0,
    perception_tag: PerceptionTag = TAGS.perception,
    reasoning_tag: ReasoningTag = TAGS.reasoning,
    shard: ShardOption = None,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
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

    Examples:

    dlmctl rollout | dlmctl verify | dlmctl stats

    dlmctl verify --verifier math --verifier format --weight format=0.2 samples.jsonl

    dlmctl verify --verifier mychecks:polite samples.jsonl

    dlmctl verify --exec ./check samples.jsonl
    """
    from dlmctl.verifiers import perception
    from dlmctl.verifiers.program import Program
    from dlmctl.verifiers.registry import find_verifier, verify

    if preset and (verifier or program):
        raise UsageError("--preset chooses the verifiers: leave out --verifier and --exec")
    # Where `python -m` would look too: module:function next to the data.
    sys.path.insert(0, os.getcwd())
    judge = Program(program, time_limit) if program else None
    extra = {"exec": judge} if judge else {}
    tags = tag_names(perception_tag, reasoning_tag)
    adapted = {
        "layout": partial(perception.layout, tags=tags),
        "grounding": partial(perception.grounding, tags=tags),
    }
    weights = dict(_weight(text) for text in weight or [])
    part = parse_shard(shard)
    records = read_shard(files or [], part, on_error)
    used: set[str] = set()
    if part is not None:  # what a weight is of may be in another one
        for name in weights.keys() - extra.keys():
            find_verifier(name)
        used.update(weights)
    verified = verify(records, verifier, weights, preset, extra, adapted, on_error, used)
    try:
        write_records(counted(verified, "verified", quiet), output)
    finally:
        if judge:
            judge.close()


def _weight(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UsageError(f"--weight {text} is not NAME=NUMBER") from None
