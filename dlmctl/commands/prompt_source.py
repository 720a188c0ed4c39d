"""Where the prompts of a stage that samples come from."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator
from itertools import count
from typing import Annotated

import typer

from dlmctl.commands.input_lines import Lines, input_lines
from dlmctl.records.jsonl import OnError, Record, read_records
from dlmctl.records.shards import Shard, check_files, parse_shard, read_shard

Task = Annotated[
    str | None,
    typer.Option(
        show_default="sudoku, when there is no FILE and standard input is a terminal or /dev/null",
        help="Take prompts from this task and not from standard input: sudoku, countdown, or "
        "anything else that 'dlmctl prompts' takes.",
    ),
]


def prompt_records(
    files: list[str],
    task: str | None,
    limit: int | None,
    seed: int,
    on_error: OnError,
    repeat: bool,
    shard: Shard | None = None,
) -> Iterator[Record]:
    """Prompt records from files, from the task, from standard input, or Sudokus, in this order."""
    if files or (task is None and _has_input()):
        records = read_shard(files, shard, on_error)
        first = next(records, None)
        if first is None:
            there = "came in" if shard is None else f"are in shard {shard}"
            print(f"dlmctl: no prompts {there}", file=sys.stderr)
            return
        yield first
        yield from records
        while repeat and files and "-" not in files:
            yield from read_records(files, on_error)
        return
    from dlmctl.tasks.sources import prompts

    for epoch in count() if repeat else range(1):
        yield from prompts(task or "sudoku", limit=limit, seed=seed + epoch, shard=shard)


def prompt_total(
    files: list[str], task: str | None, limit: int, shard: Shard | None
) -> int | Lines:
    """How many prompts such a source has, to be called before it is read."""
    if files or (task is None and _has_input()):
        lines = input_lines(files)
        return lines if shard is None else lines.times(1 / shard.count)
    if shard is None:
        return limit
    first, end = shard.bounds(limit)
    return end - first


def prompt_shard(text: str | None, files: list[str], task: str | None) -> Shard | None:
    """The shard that `--shard` names; raises UsageError where there is none of these prompts."""
    shard = parse_shard(text)
    if shard is not None and (files or (task is None and _has_input())):
        check_files(files)
    return shard


def _has_input() -> bool:
    """Whether standard input is a file or a pipe, not a terminal, /dev/null or closed."""
    try:
        status = os.fstat(sys.stdin.fileno())
    except (OSError, ValueError, AttributeError):
        return sys.stdin is not None and not sys.stdin.closed
    if not stat.S_ISCHR(status.st_mode):
        return True
    return not sys.stdin.isatty() and status.st_rdev != os.stat(os.devnull).st_rdev
