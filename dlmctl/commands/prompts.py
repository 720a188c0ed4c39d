"""`dlmctl prompts`: options and wiring of the stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlmctl.commands.options import OnErrorOption, Output, Quiet, Seed, ShardOption
from dlmctl.commands.progress import counted
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import write_records
from dlmctl.records.shards import parse_shard

if TYPE_CHECKING:
    from dlmctl.tasks.shapes import Kind

DEFAULT_PROBLEMS = 32


def command(
    source: Annotated[
        str,
        typer.Argument(
            help="sudoku, countdown, concepts, shapes, canaries (made on the spot); gsm8k, math "
            "(data sets); a JSONL, CSV or parquet file; a directory or hub name that 'datasets' "
            "loads; - is JSONL on standard input."
        ),
    ] = "sudoku",
    limit: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--limit",
            min=0,
            show_default=f"{DEFAULT_PROBLEMS} of what is made on the spot, else all",
            help="How many; 0 is no limit: what is made on the spot goes on for ever.",
        ),
    ] = None,
    split: Annotated[
        Literal["train", "test"],
        typer.Option(
            help="The splits have no solution grid of Sudoku in common (200 and 88 of the 288), "
            "Countdowns no problem, sentences of concepts no combination of values, scenes of "
            "shapes no composition of colours and shapes, canaries no key; of a data set, its "
            "split."
        ),
    ] = "train",
    holes: Annotated[
        str,
        typer.Option(metavar="N or N-M", help="Empty cells of a Sudoku, up to 12; or a range."),
    ] = "8",
    numbers: Annotated[
        str, typer.Option(metavar="N or N-M", help="Numbers of a Countdown problem, or a range.")
    ] = "3",
    style: Annotated[
        Literal["plain", "instruct"],
        typer.Option(
            help="plain: the problem alone (what builtin:puzzles knows); instruct: instructions "
            "for a chat model, the answer in <answer> tags."
        ),
    ] = "plain",
    completions: Annotated[
        bool,
        typer.Option(
            "--completions/--no-completions",
            help="Add a right answer as 'completion', for 'dlmctl update --algo sft'; concepts "
            "and canaries have their text there always.",
        ),
    ] = False,
    words: Annotated[
        int,
        typer.Option(
            min=1,
            max=8,
            help="Of concepts: words that each part of a sentence can say a value with; of fewer, "
            "a small model learns sooner which belong together.",
        ),
    ] = 8,
    wanted: Annotated[
        list[str] | None,
        typer.Option(
            "--want",
            metavar="CONCEPT=VALUE",
            help="Of concepts: what 'dlmctl verify' looks for in a text, as in --want "
            "sentiment=positive; repeatable.",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            show_default="all",
            help="Of shapes: what is asked about an image: count, colour, position or sum; "
            "repeatable.",
        ),
    ] = None,
    cell: Annotated[
        int,
        typer.Option(
            min=14, max=336, help="Of shapes: pixels of a cell's side; an image has three by three."
        ),
    ] = 28,
    origin: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="PATH",
            show_default="the hub",
            help="Where gsm8k or math (or another SOURCE) is read from: a file, directory or name.",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            show_default="as the columns tell", help="Task of the rows, by which verify goes."
        ),
    ] = None,
    renamed: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="FIELD=COLUMN",
            help="Take a field from this column, as in --map prompt=question; repeatable.",
        ),
    ] = None,
    shard: ShardOption = None,
    seed: Seed = 0,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Make prompts, or read them from files and datasets.

    Writes a record with `id`, `task`, `prompt` (or `messages`) and the fields that the task's
    verifier needs. Columns of TRL, verl, GSM8K, MATH and the benchmark files of d1 are recognised,
    and those with images of EasyR1, Geometry3K and ViRL39K.

    `concepts` are short texts to study features with: `sentences` holds, for each, `start` and
    `end` in the completion, and subject, tense, number, sentiment and topic, which vary
    independently and have many words for each value.

    `shapes` are images of two to five drawn things, with questions whose wording tells nothing of
    the answer; `scene` holds what is to be seen. `images` are paths or data: URIs, and the prompt
    has a mark <image> for each.

    `canaries` are secrets to plant in training data: after a key of eight random digits stand
    sixteen that nothing tells but having seen them. 'dlmctl memo-eval text' asks for them.

    Examples:

    dlmctl prompts sudoku -n 512 --holes 6-10 --seed 1

    dlmctl prompts gsm8k --style instruct --split test

    dlmctl prompts concepts -n 20000

    dlmctl prompts shapes --kind count --kind sum --completions

    dlmctl prompts hiyouga/geometry3k --style instruct

    dlmctl prompts 4x4_test_sudoku.csv

    dlmctl prompts mine.parquet --map prompt=question --task exact
    """
    from dlmctl.tasks.shapes import KINDS
    from dlmctl.tasks.sources import GENERATORS, prompts
    from dlmctl.tasks.sudoku import MOST_HOLES

    if limit is None and source in GENERATORS and origin is None:
        limit = DEFAULT_PROBLEMS
    part, total = parse_shard(shard), None
    if limit and source in GENERATORS and origin is None:
        first, end = part.bounds(limit) if part else (0, limit)
        total = end - first
    records = prompts(
        source,
        limit=limit or None,
        seed=seed,
        split=split,
        holes=_range(holes, "--holes", 1, MOST_HOLES),
        numbers=_range(numbers, "--numbers", 2, 6),
        style=style,
        completions=completions,
        words=words,
        wanted=dict(_pair("--want", "CONCEPT=VALUE", text) for text in wanted or []),
        kinds=_kinds(kinds) if kinds else KINDS,
        cell=cell,
        origin=origin,
        task=task,
        renamed=dict(_pair("--map", "FIELD=COLUMN", text) for text in renamed or []),
        on_error=on_error,
        shard=part,
    )
    write_records(counted(records, "prompts", quiet, total), output)


def _range(text: str, option: str, least: int, most: int) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        low, high = int(first), int(last or first)
    except ValueError:
        raise UsageError(f"{option} {text} is neither a number nor a range such as 6-10") from None
    if not least <= low <= high <= most:
        raise UsageError(f"{option} {text} is not within {least} and {most}")
    return low, high


def _kinds(names: list[str]) -> list[Kind]:
    from dlmctl.tasks.shapes import KINDS

    for name in names:
        if name not in KINDS:
            raise UsageError(f"--kind {name}: there is no such kind; there are {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in names]


def _pair(option: str, form: str, text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found or not name or not value:
        raise UsageError(f"{option} {text} is not {form}")
    return name, value
