"""Where prompts come from, by name: generators, data sets of the literature, files.

To add a generator, write `dlmctl/tasks/NAME.py` with a function `records(settings, seed)`, an
endless iterator of records, and put NAME into `GENERATORS`. A package may add a source under the
entry-point group `dlmctl.tasks`: a function of (seed, split) that yields records.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import entry_points
from itertools import islice
from typing import Any

from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, Record, each
from dlmctl.records.shards import Shard, check_files
from dlmctl.settings.prompts import Prompts, Split
from dlmctl.tasks.columns import to_record
from dlmctl.tasks.readers import read_rows

GENERATORS = ("sudoku", "countdown", "arithmetic", "concepts", "shapes", "canaries")
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
"""Task and split to hub name, configuration and name of the split there. They are the data sets
that d1 trains on."""


def prompts(
    source: str,
    settings: Prompts = Prompts(),
    *,
    limit: int | None = None,
    seed: int = 0,
    on_error: OnError = "fail",
    shard: Shard | None = None,
) -> Iterator[Record]:
    """Prompt records.

    Args:
        source: a generator, a data set, a source of another package, a file, a directory, or a
            hub name.
        limit: how many; None is all, and without end for a generator.
        shard: the part that is yielded; None is all.

    Raises:
        UsageError: a shard of an endless source, or of one that cannot be read twice.
    """
    generated = is_generated(source, settings)
    stream = _records(source, settings, seed, on_error)
    if limit and generated:
        stream = _distinct(stream, source)
    first, end = 0, limit
    if shard is not None:
        if not generated:
            limit = _length(source, settings, seed, limit)
        if limit is None:
            raise UsageError(f"--shard of {source}, which has no end: say how many with -n")
        first, end = shard.bounds(limit)
    yield from islice(stream, first, end)


def is_generated(source: str, settings: Prompts) -> bool:
    """Whether a source is an endless generator of this package."""
    return source in GENERATORS and settings.origin is None


def _records(source: str, settings: Prompts, seed: int, on_error: OnError) -> Iterator[Record]:
    if is_generated(source, settings):
        module = importlib.import_module(f"dlmctl.tasks.{source}")
        return map(Record, module.records(settings, seed))
    if (plugin := _plugin(source)) is not None:
        return map(Record, plugin(seed, settings.split))
    task = settings.task
    if source in DATASETS or source in GENERATORS:
        task = task or source
    name, config, part = _place(source, settings)
    rows = read_rows(name, part, config, on_error)
    return each(rows, lambda row: to_record(row, settings.columns, task, settings.style), on_error)


def _length(source: str, settings: Prompts, seed: int, limit: int | None) -> int:
    """Number of rows, at most `limit`; raises UsageError if they cannot be read twice."""
    rows: Iterable[Any]
    if (plugin := _plugin(source)) is not None:
        rows = plugin(seed, settings.split)
    else:
        name, config, part = _place(source, settings)
        check_files([name])
        rows = read_rows(name, part, config, "keep")
    return sum(1 for _ in islice(rows, limit))


def _place(source: str, settings: Prompts) -> tuple[str, str | None, str]:
    """Where rows are: file, directory or hub name; configuration; split."""
    if source in DATASETS and settings.origin is None:
        return DATASETS[source][settings.split]
    return settings.origin or source, None, settings.split


def _plugin(name: str) -> Callable[[int, Split], Iterable[dict[str, Any]]] | None:
    """The source of another package under this name."""
    installed = entry_points(group="dlmctl.tasks", name=name)
    return next(iter(installed)).load() if installed else None


def _distinct(records: Iterator[Record], source: str) -> Iterator[Record]:
    """The records without repeated ids; remembers all ids, so the stream must end.

    Raises:
        UsageError: there are fewer different prompts than are asked for.
    """
    seen: set[int] = set()
    repeated = 0
    for record in records:
        key = hash(record["id"])
        repeated = repeated + 1 if key in seen else 0
        if repeated > 1000 + 20 * len(seen):
            raise UsageError(
                f"{source} has {len(seen):,} different prompts with these options, and -n asks for "
                "more: -n 0 goes on for ever, with repetitions"
            )
        if not repeated:
            seen.add(key)
            yield record
