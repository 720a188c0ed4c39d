"""Experiment trackers, each by its own client: where the metrics of a run go besides its file.

    RUN/trackers/wandb.json     the tracked run that belongs to RUN, and the newest step it was sent
    RUN/trackers/wandb/         what wandb writes on this machine
    RUN/tensorboard/            event files

A tracker that can be asked for the steps that it has is asked when it is opened: a process that
died between sending a step and noting it sends nothing twice. These are event files, mlflow, and
trackio on this machine. wandb cannot be asked in its offline mode: what was noted counts.
"""

from __future__ import annotations

import importlib.util
import os
import secrets
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from dlmctl.records.errors import UsageError, missing_package
from dlmctl.records.files import make_directory, read_json, write_file
from dlmctl.records.jsonl import dump
from dlmctl.report.event_files import EventFile, last_step
from dlmctl.settings.training import TRACKERS

PROJECT = "dlmctl"
"""Project or experiment, unless the variables of the tracker name another."""


class Memory:
    """What a run remembers of a tracker, in a file."""

    def __init__(self, directory: Path, tracker: str) -> None:
        """Raises DataError if the file is damaged."""
        self.directory = directory
        self._path = directory / "trackers" / f"{tracker}.json"
        known = read_json(self._path) if self._path.exists() else {}
        self.run: str | None = known.get("run")
        """Id of the tracked run, once there is one."""
        self.store: str | None = known.get("store")
        """Where it is, if on this machine, and nobody says so."""
        self.steps: dict[str, int] = known.get("steps", {})
        """The newest step that was sent, for each line of the run."""

    def save(self) -> None:
        """Write the file."""
        known = {"run": self.run, "store": self.store, "steps": self.steps}
        make_directory(self._path.parent)
        write_file(self._path, dump({n: v for n, v in known.items() if v is not None}))


class Tracker(Protocol):
    """An open run of a tracker."""

    where: str
    """What a person is told of it."""

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step; raises whatever the client raises."""

    def close(self, whole: bool) -> None:
        """Send what is under way; `whole`: the command ended by itself."""


class Wandb:
    """A run of Weights & Biases."""

    def __init__(self, memory: Memory, about: Mapping[str, Any]) -> None:
        import wandb

        begun = memory.run is not None
        memory.run = memory.run or secrets.token_hex(4)
        memory.save()
        os.environ.setdefault("WANDB_PROJECT", PROJECT)
        os.environ.setdefault("WANDB_NAME", memory.directory.name)
        os.environ.setdefault("WANDB_DIR", str(memory.directory / "trackers"))
        # The trainer is the process whose memory and load are of interest.
        settings = wandb.Settings(console="off", silent=True, x_stats_pid=os.getppid())
        self._run = wandb.init(
            id=memory.run,
            resume="allow",
            config=None if begun else dict(about),
            settings=settings,
        )
        self._lines: set[str] = set()
        self.where = self._run.url or f"offline: send it with  wandb sync {self._offline()}"

    def _offline(self) -> Path:
        return Path(self._run.dir).parent

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        """Each line has a step of its own, since those of wandb itself must not go back."""
        if not line:
            self._run.log(dict(numbers), step=step)
            return
        if line not in self._lines:
            self._run.define_metric(f"{line}/*", step_metric=f"{line}/step")
            self._lines.add(line)
        self._run.log(_named(line, {**numbers, "step": step}))

    def close(self, whole: bool) -> None:
        """Wait until all is sent."""
        self._run.finish(exit_code=0 if whole else 1)


class Trackio:
    """A run of Trackio."""

    def __init__(self, memory: Memory, about: Mapping[str, Any]) -> None:
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        # Trackio knows a run by its name; two directories may have the same.
        memory.run = memory.run or f"{memory.directory.name}-{secrets.token_hex(3)}"
        memory.save()
        self._run = trackio.init(
            project=project,
            name=memory.run,
            resume="allow",
            config=dict(about),  # without it, a run that resumes would lose what it had
            embed=False,
            auto_log_cpu=False,
        )
        if not any(name in os.environ for name in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")):
            memory.steps = self._steps(project, memory.run)
        self.where = f"{project}/{memory.run}: see it with  trackio show --project {project}"

    @staticmethod
    def _steps(project: str, name: str) -> dict[str, int]:
        from trackio.sqlite_storage import SQLiteStorage

        steps: dict[str, int] = {}
        for row in SQLiteStorage.get_logs(project, name, max_points=None):
            line = next((field[:-5] for field in row if field.endswith("/step")), "")
            steps[line] = max(int(row["step"]), steps.get(line, -1))
        return steps

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        """A line is known by its number `step`."""
        self._run.log(_named(line, {**numbers, "step": step} if line else numbers), step=step)

    def close(self, whole: bool) -> None:
        """Wait until all is sent."""
        self._run.finish()


class Mlflow:
    """A run of MLflow."""

    def __init__(self, memory: Memory, about: Mapping[str, Any]) -> None:
        import mlflow

        if not mlflow.is_tracking_uri_set() and memory.store:
            mlflow.set_tracking_uri(memory.store)
        uri = mlflow.get_tracking_uri()
        if not {"MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"} & os.environ.keys():
            mlflow.set_experiment(PROJECT)
        self._client: Any = mlflow
        self._has: dict[str, int] = defaultdict(lambda: -1)
        if memory.run:
            # Numbers of a step are not always stored together, so that each is asked for.
            run = mlflow.start_run(run_id=memory.run)
            client = mlflow.MlflowClient()
            for name in run.data.metrics:
                history = client.get_metric_history(memory.run, name)
                self._has[name] = max(metric.step for metric in history)
            memory.steps = {}
        else:
            run = mlflow.start_run(run_name=memory.directory.name)
            memory.run = run.info.run_id
            # A path depends on where the command was called; a server may be in it with a password.
            memory.store = uri if uri.startswith(("sqlite:", "file:")) else None
            memory.save()
            mlflow.log_params({name: str(value)[:500] for name, value in about.items()})
        self.where = f"run {memory.run} of {uri.split('@')[-1]}"

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        """In names, MLflow allows neither = nor commas."""
        named = _named(line.replace("=", " ").replace(",", " "), numbers)
        new = {name: value for name, value in named.items() if step > self._has[name]}
        if new:
            self._client.log_metrics(new, step=step)
            self._has.update(dict.fromkeys(new, step))

    def close(self, whole: bool) -> None:
        """Say that the run has ended."""
        self._client.end_run("FINISHED" if whole else "KILLED")


class TensorBoard:
    """Event files in the directory of the run, one folder for each line."""

    def __init__(self, memory: Memory, _about: Mapping[str, Any]) -> None:
        self._directory = memory.directory / "tensorboard"
        self._files: dict[str, EventFile] = {}
        folders = {file.parent for file in self._directory.rglob("events.*")}
        memory.steps = {self._line(folder): last_step(folder) for folder in folders}
        self.where = f"{self._directory}: see it with  tensorboard --logdir {self._directory}"

    def _line(self, folder: Path) -> str:
        return "" if folder == self._directory else folder.name

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        """Append an event to the folder of the line."""
        if line not in self._files:
            self._files[line] = EventFile(self._directory / line.replace("/", "_"))
        self._files[line].add(step, numbers)
        self._files[line].flush()

    def close(self, whole: bool) -> None:
        """End the files."""
        for file in self._files.values():
            file.close()


KINDS: dict[str, Any] = {
    "trackio": Trackio,
    "wandb": Wandb,
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
}


def trackers_of(log: Iterable[str] | None) -> list[str]:
    """The trackers that --log names, each once.

    Raises:
        UsageError: there is no such tracker.
        UnavailableError: its package is not installed.
    """
    names = [name.strip() for text in log or [] for name in text.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"--log {name} is none of {', '.join(TRACKERS)}")
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise missing_package(name, name, f"--log {name}")
    return list(dict.fromkeys(names))


def _named(line: str, numbers: Mapping[str, float]) -> dict[str, float]:
    """The numbers under names that begin with their line, as those of evaluations do already."""
    prefix = f"{line}/" if line else ""
    return {
        name if name.startswith(prefix) else f"{prefix}{name}": value
        for name, value in numbers.items()
    }
