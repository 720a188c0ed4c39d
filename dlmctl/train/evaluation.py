"""Held-out evaluation of a run's checkpoints by a command, and the best checkpoint by it.

The command is a shell pipe that writes records; the result is the mean of a number in them. It is
appended to metrics.jsonl, and RUN/best is a link to the best checkpoint, which is not removed. What
the run began with is evaluated first, so that a command that fails says so before any training.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import torch

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import publish_link
from dlmctl.records.jsonl import located, nested
from dlmctl.report.estimate import stratified_mean
from dlmctl.report.metrics_tail import EVALUATION, MetricsTail
from dlmctl.settings.training import Evaluating
from dlmctl.train.run_directory import BEST, RunDirectory, checkpoint_name, latest_checkpoint

OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables without which a command of ours is one process."""


class Evaluations:
    """The evaluations of a run; used on its first rank alone."""

    def __init__(
        self, settings: Evaluating, directory: RunDirectory[Any], algo: str, begin: str | None
    ) -> None:
        """Args:
            begin: the model of the beginning; None if it cannot be evaluated by its name.

        Raises:
            UsageError: there is no bash, which alone tells that a stage of a pipe failed.
        """
        self._settings, self._directory, self._algo = settings, directory, algo
        self._begin = begin
        self._measure = settings.eval_measure
        self._found = [*self._earlier()]
        """Steps and results, in the order of the steps."""
        if shutil.which("bash") is None:
            raise UsageError("--eval runs its command in bash, which is not installed")

    def at(self, step: int, last: bool = False) -> dict[str, Any] | None:
        """Evaluate the newest checkpoint, which is of this step, if its turn has come.

        Args:
            last: no checkpoint follows.

        Returns:
            The record of the evaluation, which is appended to metrics.jsonl; None if there is none.

        Raises:
            DataError: the command failed, or its output has no such number in a record.
        """
        self._publish_best()  # a process may have been killed before it did
        before = self._found[-1][0] if self._found else None
        if before is not None and step - before < (1 if last else self._settings.eval_every):
            return None
        model = latest_checkpoint(self._directory.path) if step else self._begin
        return None if model is None else self._evaluate(str(model), step)

    def verdict(self) -> str | None:
        """Why training is to end; None: it is not."""
        patience, best = self._settings.patience, self._best()
        if patience is None or best is None:
            return None
        since = sum(step > best for step, _ in self._found)
        if since < patience:
            return None
        value = dict(self._found)[best]
        return (
            f"{self._measure} was {value:.4g} after step {best}, and no better in "
            f"{since} evaluations since: training ends (--patience {patience})"
        )

    def _evaluate(self, model: str, step: int) -> dict[str, Any]:
        begun = time.monotonic()
        rows = [*self._rows(_output(self._settings.eval or "", model))]
        if not rows:
            raise DataError("it wrote no record", "--eval")
        prompts = {key: number for number, key in enumerate(dict.fromkeys(key for key, _ in rows))}
        prompt = torch.tensor([prompts[key] for key, _ in rows])
        values = torch.tensor([value for _, value in rows], dtype=torch.float64)
        mean = stratified_mean(values, torch.zeros_like(prompt))
        error = mean.error(prompt)
        record = {
            "algo": self._algo,
            "run": self._directory.path.name,
            "step": step,
            EVALUATION: {
                self._measure: mean.value,
                **({} if error is None else {f"{self._measure}_se": error}),
                "prompts": len(prompts),
                "seconds": time.monotonic() - begun,
            },
        }
        self._directory.append(record)
        self._found.append((step, mean.value))
        self._publish_best()
        return record

    def _publish_best(self) -> None:
        step = self._best(trained=True)
        if step is None:
            return
        link, name = self._directory.path / BEST, checkpoint_name(step)
        if link.resolve().name != name:
            publish_link(link, name)

    def _best(self, trained: bool = False) -> int | None:
        """The earliest step with the best result; `trained`: but for the model of the beginning."""
        sign = -1 if self._settings.eval_goal == "highest" else 1
        found = [(sign * value, step) for step, value in self._found if step or not trained]
        return min(found)[1] if found else None

    def _earlier(self) -> Iterator[tuple[int, float]]:
        for record, _ in MetricsTail(self._directory.path).records():
            if self._measure in record.get(EVALUATION, {}):
                yield record["step"], record[EVALUATION][self._measure]

    def _rows(self, output: bytes) -> Iterator[tuple[str, float]]:
        """Prompt and number of each record."""
        measure = self._measure
        for number, line in enumerate(output.splitlines(), 1):
            where = f"--eval, record {number}"
            try:
                fields = orjson.loads(line)
            except orjson.JSONDecodeError:
                fields = None
            if not isinstance(fields, dict):
                raise DataError(f"{line[:80]!r} is no record", where)
            record = located(fields, where)
            value = nested(record, measure)
            if not isinstance(value, int | float):
                why = f": {record['error']}" if "error" in record else "; see --eval-measure"
                raise DataError(f"it has no number '{measure}'{why}", where)
            yield str(record.get("id", f"record-{number}")), float(value)


def _output(command: str, model: str) -> bytes:
    """What a shell command writes about a model, in a session of its own."""
    variables = {name: value for name, value in os.environ.items() if name not in OF_TORCHRUN}
    variables["DLMCTL_MODEL"] = str(Path(model).resolve()) if Path(model).exists() else model
    process = subprocess.Popen(
        ["bash", "-o", "pipefail", "-c", command],
        stdin=subprocess.DEVNULL,  # the records of the training are not for it
        stdout=subprocess.PIPE,
        env=variables,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate()
    finally:
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        raise DataError(f"'{command}' failed with exit code {process.returncode}", "--eval")
    return output
