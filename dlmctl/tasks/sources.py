"""Where prompts come from, by name: generators, data sets of the literature, files.

A package may add a source under the entry-point group `dlmctl.tasks`: a function of (seed, split)
that yields records.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from importlib.metadata import entry_points
from itertools import islice
from typing import Any

from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, Record, each
from dlmctl.records.shards import Shard, check_files
from dlmctl.tasks import canaries, concepts, countdown, shapes, sudoku
from dlmctl.tasks.columns import to_record
from dlmctl.tasks.drawing import draw_scene
from dlmctl.tasks.images import as_data_uri
from dlmctl.tasks.readers import read_rows
from dlmctl.tasks.sudoku import Split
from dlmctl.tasks.wording import Style, countdown_prompt, shapes_prompt, sudoku_prompt

GENERATORS = ("sudoku", "countdown", "concepts", "shapes", "canaries")
DATASETS: dict[str, dict[str, tuple[str, str | None, str]]] = {
    "gsm8k": {
        "train": ("openai/gsm8k", "main", "train"),
        "test": ("openai/gsm8k", "main", "test"),
    },
    "math": {
        "train": ("ankner/math-500", None, "train"),
        "test": ("HuggingFaceH4/MATH-500", None, "test"),
    },
}
"""Task and split: hub name, configuration, the split's name there; those that d1 trains on."""


def prompts(
    source: str,
    *,
    limit: int | None = None,
    seed: int = 0,
    split: Split = "train",
    holes: tuple[int, int] = (8, 8),
    numbers: tuple[int, int] = (3, 3),
    style: Style = "plain",
    completions: bool = False,
    words: int = concepts.WORDS,
    wanted: Mapping[str, str] | None = None,
    kinds: Sequence[shapes.Kind] = shapes.KINDS,
    cell: int = shapes.CELL,
    origin: str | None = None,
    task: str | None = None,
    renamed: Mapping[str, str] | None = None,
    on_error: OnError = "fail",
    shard: Shard | None = None,
) -> Iterator[Record]:
    """Prompt records.

    Args:
        source: sudoku, countdown, concepts, shapes, canaries, gsm8k, math, a source of a plugin, a
            file, a data set.
        limit: how many; None is all there are, for a generator without end.
        holes: fewest and most empty cells of a Sudoku.
        numbers: fewest and most numbers of a Countdown problem.
        completions: add `completion`, a right answer in the words of `style` plain; concepts
            and canaries have theirs always.
        words: words that a part of a sentence of concepts can say a value with.
        wanted: concept to value, which `verify` looks for in what is written from concepts.
        kinds: of the questions about shapes.
        cell: pixels of the side of a cell of shapes.
        origin: where gsm8k or math is read from instead of the hub.
        renamed: record field to column.
        shard: the part of them that is wanted; None is all.

    Raises:
        UsageError: a shard of what has no end, or cannot be read twice.
    """
    made = source in GENERATORS and origin is None
    if source == "sudoku" and origin is None:
        stream = _sudoku(split, holes, seed, style, completions)
    elif source == "countdown" and origin is None:
        stream = _countdown(split, numbers, seed, style, completions)
    elif source == "concepts" and origin is None:
        stream = _concepts(split, seed, words, wanted or {})
    elif source == "shapes" and origin is None:
        stream = _shapes(split, seed, kinds, cell, style, completions)
    elif source == "canaries" and origin is None:
        stream = _canaries(split, seed)
    elif (plugin := _plugin(source)) is not None:
        stream = (Record(record) for record in plugin(seed, split))
    else:
        stream = _rows(source, origin, split, style, task, renamed or {}, on_error)
    distinct = _distinct(stream) if limit and made else stream
    first, end = 0, limit
    if shard is not None:
        if not made:
            limit = _length(source, origin, split, seed, limit)
        if limit is None:
            raise UsageError(f"--shard of {source}, which has no end: say how many with -n")
        first, end = shard.bounds(limit)
    yield from islice(distinct, first, end)


def _length(source: str, origin: str | None, split: Split, seed: int, limit: int | None) -> int:
    """How many rows there are, up to the limit; raises UsageError where that ends them."""
    rows: Iterator[Any]
    if (plugin := _plugin(source)) is not None:
        rows = plugin(seed, split)
    else:
        name, config, part = _place(source, origin, split)
        check_files([name])
        rows = read_rows(name, part, config, "keep")
    return sum(1 for _ in islice(rows, limit))


def _place(source: str, origin: str | None, split: Split) -> tuple[str, str | None, str]:
    """Where rows are: file, directory or name; configuration; split."""
    if source in DATASETS and origin is None:
        return DATASETS[source][split]
    return origin or source, None, str(split)


def _sudoku(
    split: Split, holes: tuple[int, int], seed: int, style: Style, completions: bool
) -> Iterator[Record]:
    for puzzle, solution in sudoku.puzzles(split, holes, seed):
        yield Record(
            id=f"sudoku/{puzzle}",
            task="sudoku",
            prompt=sudoku_prompt(puzzle, style),
            puzzle=puzzle,
            solution=solution,
            **({"completion": solution} if completions else {}),
        )


def _countdown(
    split: Split, numbers: tuple[int, int], seed: int, style: Style, completions: bool
) -> Iterator[Record]:
    for problem in countdown.problems(split, numbers, seed):
        listed = ",".join(map(str, problem.numbers))
        yield Record(
            id=f"countdown/{listed}:{problem.target}",
            task="countdown",
            prompt=countdown_prompt(problem.numbers, problem.target, style),
            numbers=problem.numbers,
            target=problem.target,
            **({"completion": problem.solution} if completions else {}),
        )


def _concepts(split: Split, seed: int, words: int, wanted: Mapping[str, str]) -> Iterator[Record]:
    for document in concepts.documents(split, seed, words):
        digest = blake2b(document.text.encode(), digest_size=8).hexdigest()
        yield Record(
            id=f"concepts/{digest}",
            task="concepts",
            prompt=concepts.PROMPT,
            **({"wanted": dict(wanted)} if wanted else {}),
            completion=document.text,
            sentences=[{"start": s.start, "end": s.end, **s.values} for s in document.sentences],
        )


def _shapes(
    split: Split,
    seed: int,
    kinds: Sequence[shapes.Kind],
    cell: int,
    style: Style,
    completions: bool,
) -> Iterator[Record]:
    for problem in shapes.problems(split, seed, kinds):
        yield Record(
            id=f"shapes/{problem.digest}",
            task="shapes",
            kind=problem.kind,
            images=[as_data_uri(draw_scene(problem.scene, problem.looks, cell))],
            prompt=shapes_prompt(problem.question, style),
            scene=[thing._asdict() for thing in problem.scene],
            answer=problem.answer,
            **({"completion": problem.completion} if completions else {}),
        )


def _canaries(split: Split, seed: int) -> Iterator[Record]:
    for key, secret in canaries.canaries(split, seed):
        yield Record(
            id=f"canaries/{key}",
            task="canaries",
            prompt=f"{key}=",
            answer=secret,
            completion=secret,
        )


def _rows(
    source: str,
    origin: str | None,
    split: Split,
    style: Style,
    task: str | None,
    renamed: Mapping[str, str],
    on_error: OnError,
) -> Iterator[Record]:
    if source in DATASETS or source in GENERATORS:
        task = task or source
    name, config, part = _place(source, origin, split)
    rows = read_rows(name, part, config, on_error)
    yield from each(rows, lambda row: to_record(row, renamed, task, style), on_error)


def _plugin(name: str) -> Callable[[int, str], Iterator[dict[str, Any]]] | None:
    found = entry_points(group="dlmctl.tasks", name=name)
    return next(iter(found)).load() if found else None


def _distinct(records: Iterator[Record]) -> Iterator[Record]:
    """No problem twice; for a stream that will end, as it remembers what it saw."""
    seen: set[int] = set()
    for record in records:
        key = hash(record["id"])
        if key not in seen:
            seen.add(key)
            yield record
