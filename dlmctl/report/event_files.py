"""Metrics records as TensorBoard's event files: a folder for each line, new steps only.

    DIR/RUN/events.out.tfevents.…                    a run of `update` or `distill`
    DIR/RUN/layer=5,k=50,positions=mask/events.…     an autoencoder of a run of `sae-train`

What a folder holds tells where the next call goes on: each adds one file, with the steps behind
the last. A file appears whole.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dlmctl.records.errors import (
    CannotCreateError,
    CannotWriteError,
    DataError,
    MissingInputError,
    UsageError,
    missing_package,
)
from dlmctl.records.jsonl import OnError, Record, read_records

METRICS = "metrics.jsonl"
LINES = ("layer", "k", "positions")
"""Fields that tell the lines of a run apart, where it has any of them."""


def run_records(sources: Sequence[str], on_error: OnError) -> Iterator[tuple[str, Record]]:
    """Records of runs and files, each with the name of its run.

    A directory, or its metrics.jsonl, is a run of the directory's name. Records of other files go
    by their field `run`, else by the file's name.

    Raises:
        MissingInputError: a directory holds no metrics.
        UsageError: two sources have runs of one name.
    """
    owners: dict[str, str] = {}
    for source in sources or ["-"]:
        path, own = Path(source), None
        if path.is_dir():
            path = path / METRICS
            if not path.exists():
                raise MissingInputError(f"{source} holds no {METRICS}: it is not a run")
        if path.name == METRICS:
            own = path.resolve().parent.name
        for record in read_records([str(path)], on_error):
            if "error" in record:
                continue
            fallback = "run" if source == "-" else path.stem
            name = own or str(record.get("run") or fallback)
            if owners.setdefault(name, source) != source:
                raise UsageError(
                    f"{owners[name]} and {source} are both named {name}: give each a -o of its own"
                )
            yield name, record


def write_events(records: Iterable[tuple[str, Record]], directory: Path, x: str) -> dict[str, int]:
    """Add the steps of the records that the folders lack; how many each of them got.

    Args:
        records: each with the name of its run.
        x: field that is the step, a whole number.

    Raises:
        UnavailableError: TensorBoard is not installed.
        DataError: a record has no such step.
        CannotCreateError, CannotWriteError: a folder or a file cannot be made.
    """
    with _Folders(directory) as folders:
        for run, record in records:
            step = record.get(x)
            if not isinstance(step, int) or isinstance(step, bool):
                raise DataError(f"field '{x}' is no whole number: give another -x", record.where)
            own = [f"{name}={record[name]}" for name in LINES if name in record]
            line = "/".join(part.replace("/", "_") for part in (run, ",".join(own)) if part)
            folders.add(line, step, dict(_numbers(record, (x, *LINES))))
    return folders.added


class _Folders:
    """The folders that are written to; their files take their places when all are done."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise missing_package("tensorboard", "tensorboard", "tensorboard") from None
        self._make = SummaryWriter
        self._directory = directory
        self._beside = directory / f".events.partial-{os.getpid()}"
        self._writers: dict[str, Any] = {}
        self._last: dict[str, int] = {}
        self.added: dict[str, int] = {}

    def __enter__(self) -> _Folders:
        try:
            self._beside.mkdir(parents=True)
        except OSError as error:
            raise CannotCreateError(f"cannot create {self._directory} ({error.strerror})") from None
        return self

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        """The numbers of a step, unless the folder has the step already."""
        if line not in self._last:
            self._last[line] = last_step(self._directory / line)
            self.added[line] = 0
        if step <= self._last[line] or not numbers:
            return
        if line not in self._writers:
            self._writers[line] = self._make(str(self._beside / line))
        for name, value in numbers.items():
            self._writers[line].add_scalar(name, value, step)
        self.added[line] += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for line, writer in self._writers.items():
                writer.close()
                if kind is None:
                    self._publish(line)
        except OSError as failure:
            raise CannotWriteError(f"cannot write {self._directory} ({failure.strerror})") from None
        finally:
            shutil.rmtree(self._beside, ignore_errors=True)

    def _publish(self, line: str) -> None:
        target = self._directory / line
        target.mkdir(parents=True, exist_ok=True)
        for file in (self._beside / line).glob("events.*"):
            os.replace(file, target / file.name)


def last_step(folder: Path) -> int:
    """The last step that a folder of event files has; -1 of none."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    steps = [
        event.step
        for file in folder.glob("events.*")
        for event in EventFileLoader(str(file)).Load()
        if event.HasField("summary")
    ]
    return max(steps, default=-1)


def _numbers(record: Mapping[str, Any], leave_out: Sequence[str]) -> Iterator[tuple[str, float]]:
    """The numbers of a record; those of a field within a field as `field/inner`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", v) for inner, v in _numbers(value, ()))
        elif isinstance(value, int | float) and name not in leave_out:
            yield name, float(value)
