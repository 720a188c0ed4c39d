"""The directory of a training run, which every trainer opens, writes and resumes in one way.

    RUN/.lock                 held by the one process that trains in RUN
    RUN/metrics.jsonl         a record of each step, or of some
    RUN/step-000012/          a checkpoint, with its counters in dlmctl.json
    RUN/latest                link to the newest checkpoint
    RUN/best                  link to the best one by --eval, which is kept

A checkpoint is filled under another name and renamed, and so is the link, so that killing the
process at any moment leaves the previous checkpoint whole; the same command then resumes from it.

The checkpoints of `update` are models that contain what their run resumes from. The results of
`sae-train` and of `distill` for images do not: these trainers resume from checkpoints in RUN/state,
which is removed when the run is done, and which have their counters in run.json.

The counters of a checkpoint are a dataclass, which every trainer declares once; its fields are
written and read by name. Under torchrun the first rank writes what a single process would write, so
that a run can resume on any number of ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_origin, get_type_hints

import orjson

from dlmctl.records.errors import CannotCreateError, DataError, UsageError
from dlmctl.records.files import (
    append_line,
    make_directory,
    publish_directory,
    publish_link,
    remove_directory,
    remove_partials,
    write_file,
)
from dlmctl.records.interrupts import standing
from dlmctl.records.jsonl import dump
from dlmctl.records.locks import Lock, hold_run
from dlmctl.train.distributed import is_first, run_on_first

P = TypeVar("P")

LATEST, BEST, COUNTERS, STATE_COUNTERS = "latest", "best", "dlmctl.json", "run.json"
SAMPLES = "samples.jsonl"
"""In a run: completions that are kept for a person to read."""
TENSORS = "training.safetensors"
"""In a checkpoint: moments of the optimizer by parameter name, and what else is no counter."""


@dataclass
class Progress:
    """Counters of the run of a language model."""

    algo: str
    reference: str
    """Name of the model that the run began with."""
    reference_revision: str
    step: int = 0
    """Optimizer steps taken, including those skipped."""
    round: int = 0
    """Rounds of rollouts trained on."""
    skipped: int = 0
    """Steps left out because a gradient was not finite."""
    completions: int = 0
    tokens: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


class RunDirectory(Generic[P]):
    """The directory of a run whose checkpoints count what the dataclass P declares."""

    def __init__(
        self, path: Path, counters: type[P], unit: str = "step", in_state: bool = False
    ) -> None:
        """Args:
        unit: what checkpoints are numbered by.
        in_state: whether they are in RUN/state.
        """
        self.path, self.unit = path, unit
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "state" if in_state else path
        self.checkpoint: Path | None = None
        """The checkpoint that the run resumes from."""
        self._counters = counters
        self._file = STATE_COUNTERS if in_state else COUNTERS
        self._lock: Lock | None = None
        """Released with this object."""

    def __str__(self) -> str:
        return str(self.path)

    def open(self, check: Callable[[P | None], None]) -> P | None:
        """Lock the directory, and return the counters of the newest checkpoint, if there is one.

        Every rank calls this. What killed processes left half-written is removed.

        Args:
            check: raises if the run may not be resumed from these counters, or not begun (None);
                called on the first rank.

        Raises:
            TryAgainError: another process trains in the directory.
            DataError: the checkpoint is damaged.
            RankError: one of these, on the other ranks.
        """

        def take() -> str:
            make_directory(self.path)
            self._lock = hold_run(self.path)
            for place in {self.path, self.checkpoints}:
                remove_partials(place)
            checkpoint = latest_checkpoint(self.checkpoints, self._file)
            check(self._read(checkpoint))
            return str(checkpoint or "")

        newest = run_on_first(take)
        self.checkpoint = Path(newest) if newest else None
        return self._read(self.checkpoint)

    def check_no_results(self) -> None:
        """Raise CannotCreateError if another kind of trainer has published results here."""
        if (self.path / LATEST).exists():
            raise CannotCreateError(f"{self} holds another kind of run: choose another -o")

    def check_settings(self, begun_with: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
        """Raise UsageError, naming the difference, unless both settings are the same as JSON."""
        settings = as_json(settings)
        # `...` is no JSON, and stands for what is missing.
        changed = [
            n for n in {**settings, **begun_with} if settings.get(n, ...) != begun_with.get(n, ...)
        ]
        if changed:
            raise UsageError(
                f"{self} holds a run with another {', '.join(changed)}: give the same options to "
                "resume it, or choose another -o"
            )

    def save(self, number: int, progress: P, fill: Callable[[Path], None], keep: int = 1) -> Path:
        """Publish the newest checkpoint, and remove all but the best and the last `keep`.

        First rank only.

        Args:
            fill: writes everything but the counters into an empty directory.

        Raises:
            CannotCreateError: the directory cannot be made.
            CannotWriteError: writing failed; the previous checkpoint is whole.
        """
        target = self.checkpoints / checkpoint_name(number, self.unit)

        def fill_all(directory: Path) -> None:
            fill(directory)
            text = json.dumps(asdict(cast(Any, progress)), indent=2, ensure_ascii=False)
            (directory / self._file).write_text(text, encoding="utf-8")

        publish_newest(target, fill_all)
        # A newer one is left by a process that was killed before it changed the link.
        older = sorted(n for n in checkpoint_numbers(self.checkpoints, self.unit) if n < number)
        best = (self.path / BEST).resolve()
        for old in older[: max(0, len(older) + 1 - keep)]:
            outdated = self.checkpoints / checkpoint_name(old, self.unit)
            if outdated.resolve() != best:
                remove_directory(outdated)
        return target

    def append(self, record: Mapping[str, Any]) -> None:
        """Append a record to metrics.jsonl, on the first rank."""
        if is_first():
            append_line(self.metrics, dump(record))

    def metrics_size(self) -> int:
        """Bytes of metrics.jsonl."""
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Remove the metrics behind this many bytes: their steps will be taken again."""
        if not size:
            self.metrics.unlink(missing_ok=True)
        elif self.metrics.exists():
            with self.metrics.open("r+b") as file:
                file.truncate(size)

    def standing(self, number: int) -> str:
        """Where the run is, for those who interrupt it."""
        return standing(self.path, self.checkpoints / LATEST, number, self.unit)

    def discard_state(self) -> None:
        """Remove RUN/state: the run is done."""
        remove_directory(self.path / "state")

    def _read(self, checkpoint: Path | None) -> P | None:
        return read_counters(checkpoint / self._file, self._counters) if checkpoint else None


def next_run(algo: str) -> Path:
    """The first of runs/ALGO-1, runs/ALGO-2, … that does not exist."""
    return next(p for n in count(1) if not (p := Path("runs") / f"{algo}-{n}").exists())


def latest_checkpoint(directory: Path, counters: str = COUNTERS) -> Path | None:
    """The newest checkpoint of a directory, its links resolved; None: it has none."""
    link = directory / LATEST
    return link.resolve() if (link / counters).exists() else None


def checkpoint_name(number: int, unit: str = "step") -> str:
    """Name of a checkpoint's directory, as step-000128."""
    return f"{unit}-{number:06d}"


def checkpoint_numbers(directory: Path, unit: str = "step") -> list[int]:
    """The numbers of the checkpoints in a directory, in no order."""
    names = (re.fullmatch(rf"{unit}-(\d+)", path.name) for path in directory.iterdir())
    return [int(name[1]) for name in names if name]


def publish_newest(target: Path, fill: Callable[[Path], None]) -> None:
    """Publish a directory, and the link `latest` to it; raises as `publish_directory`."""
    publish_directory(target, fill)
    publish_link(target.parent / LATEST, target.name)


def read_progress(checkpoint: Path) -> Progress:
    """The counters of a checkpoint of a language model; raises as `read_counters`."""
    return read_counters(checkpoint / COUNTERS, Progress)


def read_counters(path: Path, counters: type[P]) -> P:
    """The counters in a file.

    Raises:
        DataError: the file is not there, or has other fields or types than the dataclass.
    """
    try:
        progress = counters(**json.loads(path.read_text(encoding="utf-8")))
        for name, kind in get_type_hints(counters).items():
            if not isinstance(getattr(progress, name), get_origin(kind) or kind):
                raise TypeError(f"{name} is no {kind}")
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"not a checkpoint's {path.name} ({error})", str(path)) from None
    return progress


def forget_steps(metrics: Path, step: int) -> None:
    """Remove the metrics of later steps, which were lost with a process and will be taken again."""
    if not metrics.exists():
        return
    lines = metrics.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
    if len(kept) < len(lines):
        write_file(metrics, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    try:
        return int(orjson.loads(line)["step"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None


def as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are after a round trip through JSON: tuples are lists."""
    made: dict[str, Any] = json.loads(json.dumps(settings))
    return made
