"""Metrics records as TensorBoard's event files: a folder per line, with new steps only.

    DIR/RUN/events.out.tfevents.…                    a run of `update` or `distill`
    DIR/RUN/layer=5,k=50,positions=mask/events.…     an autoencoder of a run of `sae-train`

Each call adds one file to a folder, with the steps behind the last that the folder has. A file
appears whole.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from dlmctl.records.errors import (
    CannotCreateError,
    CannotWriteError,
    DataError,
    MissingInputError,
    UsageError,
    missing_package,
)
from dlmctl.records.jsonl import OnError, Record, read_records
from dlmctl.report.metrics_tail import METRICS, line_of, numbers_of


def run_records(sources: Sequence[str], on_error: OnError) -> Iterator[tuple[str, Record]]:
    """Records of runs and files, each with the name of its run.

    A directory, or its metrics.jsonl, is a run of the directory's name. Records of other files go
    by their field `run`, else by the file's name.

    Raises:
        MissingInputError: a directory has no metrics.
        UsageError: two sources have runs of the same name.
    """
    owners: dict[str, str] = {}
    for source in sources or ["-"]:
        path, directory = Path(source), None
        if path.is_dir():
            path = path / METRICS
            if not path.exists():
                raise MissingInputError(f"{source} has no {METRICS}: it is not a run")
        if path.name == METRICS:
            directory = path.resolve().parent.name
        for record in read_records([str(path)], on_error):
            if "error" in record:
                continue
            fallback = "run" if source == "-" else path.stem
            name = directory or str(record.get("run") or fallback)
            if owners.setdefault(name, source) != source:
                raise UsageError(
                    f"{owners[name]} and {source} are both named {name}: give each a -o of its own"
                )
            yield name, record


def write_events(records: Iterable[tuple[str, Record]], directory: Path, x: str) -> dict[str, int]:
    """Add the steps that the folders lack; returns the number of new steps per folder.

    Args:
        records: each with the name of its run.
        x: field that is the step, a whole number.

    Raises:
        UnavailableError: TensorBoard is not installed.
        DataError: a record has no such step.
        CannotCreateError, CannotWriteError: a folder or a file cannot be written.
    """
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise missing_package("tensorboard", "tensorboard", "tensorboard") from None
    last: dict[str, int] = {}
    added: dict[str, int] = {}
    with _writers(directory) as writer_of:
        for run, record in records:
            step = record.get(x)
            if not isinstance(step, int) or isinstance(step, bool):
                raise DataError(f"field '{x}' is no whole number: give another -x", record.where)
            parts = (run, line_of(record))
            line = "/".join(part.replace("/", "_") for part in parts if part)
            if line not in last:
                last[line] = last_step(directory / line)
                added[line] = 0
            numbers = numbers_of(record, x)
            if step <= last[line] or not numbers:
                continue
            writer_of(line).add(step, numbers)
            added[line] += 1
    return added


class EventFile:
    """A new event file in a folder; a step is in it with all its numbers, or not at all."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))

    def add(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append the numbers of a step."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.add_event(
            Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        )

    def flush(self) -> None:
        """Hand what was added to the system."""
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


@contextlib.contextmanager
def _writers(directory: Path) -> Iterator[Callable[[str], EventFile]]:
    """A function from a folder's name to its writer; files move into the folders at the end.

    After an error no file moves.
    """
    partial = directory / f".events.partial-{os.getpid()}"
    writers: dict[str, EventFile] = {}

    def writer_of(line: str) -> EventFile:
        if line not in writers:
            writers[line] = EventFile(partial / line)
        return writers[line]

    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise CannotCreateError(f"cannot create {directory} ({error.strerror})") from None
    try:
        yield writer_of
        for line, writer in writers.items():
            writer.close()
            (directory / line).mkdir(parents=True, exist_ok=True)
            for file in (partial / line).glob("events.*"):
                os.replace(file, directory / line / file.name)
    except OSError as error:
        raise CannotWriteError(f"cannot write {directory} ({error.strerror})") from None
    finally:
        for writer in writers.values():
            with contextlib.suppress(OSError):
                writer.close()
        shutil.rmtree(partial, ignore_errors=True)


def last_step(folder: Path) -> int:
    """The last step in a folder of event files; -1 if there is none."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps = [
        event.step
        for file in folder.glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        if event.HasField("summary")
    ]
    return max(steps, default=-1)
