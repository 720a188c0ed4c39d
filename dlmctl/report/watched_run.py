"""A run as it is looked at while it goes on: its curves, where it is, and how fast."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmctl.records.errors import MissingInputError
from dlmctl.records.locks import run_owner
from dlmctl.report.metrics_tail import EVALUATION, METRICS, MetricsTail, line_of, numbers_of
from dlmctl.report.times import duration, pace

FIELDS = ("reward", "accuracy", "fve", "loss", "kl", "l0", "dead", "grad_norm")
"""What is drawn if nothing is chosen, as far as a run has it, the most telling first."""
SEEN = 20
"""The rate is computed from this many of the last looks that found something new."""

Series = dict[str, list[tuple[float, float]]]
"""Name of a line of the run to its steps and values."""


class WatchedRun:
    """What is known of a run after the last look."""

    def __init__(self, directory: Path, fields: Sequence[str], total: int | None) -> None:
        """Args:
        fields: what is to be drawn; none: what it has of `FIELDS`.
        total: steps that there will be; None: what the run says, if it does.

        Raises:
            MissingInputError: it is no run.
        """
        self.directory = directory
        self.owner: int | None = None
        """The process that trains."""
        self.series: dict[str, Series] = {}
        """By field, in the order in which they are drawn."""
        self._fields, self._given = tuple(fields), total
        self._tail = MetricsTail(directory)
        self._last: dict[str, int] = {}
        self._algo = ""
        self._seconds: deque[tuple[int, float]] = deque(maxlen=SEEN)
        self._seen: deque[tuple[float, float]] = deque(maxlen=SEEN)
        self._written = 0.0
        self._total = total
        self.look()
        if not self._last and self.owner is None:
            what = f"has no {METRICS}: it is not a run" if directory.exists() else "is not there"
            raise MissingInputError(f"{directory} {what}")

    def look(self) -> None:
        """Read what is new."""
        self.owner = run_owner(self.directory)
        new = False
        for record, end in self._tail.records():
            self._take(record)
            self._tail.offset, new = end, True
        if self._given is None:
            self._total = self._said() or self._total
        if new:
            with contextlib.suppress(OSError):
                self._written = self._tail.path.stat().st_mtime
            self._seen.append((self._written, self.step))

    def _take(self, record: Mapping[str, Any]) -> None:
        line, step, numbers = line_of(record), record["step"], numbers_of(record)
        if step <= self._last.get(line, -1):  # the run resumed, and takes these steps again
            for series in self.series.values():
                series[line] = [point for point in series.get(line, []) if point[0] < step]
            self._seen.clear()
        self._last[line], self._algo = step, str(record.get("algo", self._algo))
        evaluated = [name for name in numbers if name.startswith(f"{EVALUATION}/")][:1]
        for name in self._fields or (*FIELDS, *evaluated):
            if name in numbers:
                self.series.setdefault(name, {}).setdefault(line, []).append((step, numbers[name]))
        order = {name: place for place, name in enumerate(self._fields or FIELDS)}
        self.series = dict(sorted(self.series.items(), key=lambda item: order.get(item[0], -1)))

    @property
    def kind(self) -> str:
        """What trains: the algorithm, or in general words."""
        if any(self._trained):
            return "sparse autoencoders" if len(self._trained) > 1 else "sparse autoencoder"
        return self._algo or "images"

    @property
    def step(self) -> float:
        """Steps taken; of several lines the mean."""
        steps = self._trained
        return sum(steps.values()) / len(steps) if steps else 0

    @property
    def _trained(self) -> dict[str, int]:
        """The last step of each line that is no evaluation."""
        return {line: step for line, step in self._last.items() if line != EVALUATION}

    @property
    def rate(self) -> float | None:
        """Steps per second: as far as it was watched, else between checkpoint and last record."""
        if not self._seen:
            return None
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        if now > began and last > first:
            return (last - first) / (now - began)
        oldest = min(self._checkpoints(), default=None)
        if oldest is not None and oldest[0] < self.step and oldest[1] < self._written:
            return (self.step - oldest[0]) / (self._written - oldest[1])
        return None

    def state(self) -> str:
        """Whether a process trains, and when it wrote last."""
        who = f"running, process {self.owner}" if self.owner else "no process trains"
        if not self._last:
            return f"{who}; no record yet"
        return f"{who}; last record {_ago(self._written)}"

    def place(self) -> str:
        """Step, rate, time left and checkpoint."""
        known = self._total is not None and self._total >= self.step > 0
        step = f"step {self.step:,.0f}"
        if known and self._total is not None:
            step += f" of {self._total:,} ({100 * self.step / self._total:.0f} %)"
        parts = [step]
        if self.rate:
            parts.append(pace(self.rate))
            left = (self._total or 0) - self.step
            if known and self.owner and left:
                parts.append(f"{duration(left / self.rate)} left")
        return ", ".join([*parts, self._newest()])

    def _newest(self) -> str:
        found = []
        for link in (self.directory / "latest", self.directory / "state" / "latest"):
            with contextlib.suppress(OSError):
                found.append((link.stat().st_mtime, os.readlink(link)))
        if not found:
            return "no checkpoint"
        at, name = max(found)
        return f"checkpoint {name} {_ago(at)}"

    def _checkpoints(self) -> list[tuple[float, float]]:
        """Step of each checkpoint, and when it was written."""
        found = []
        for path in [*self.directory.glob("step-*"), *self.directory.glob("state/step-*")]:
            with contextlib.suppress(OSError, ValueError):
                found.append((float(path.name[5:]), path.stat().st_mtime))
        return found

    def _said(self) -> int | None:
        """Steps that there will be, in the state of `distill` and `sae-train`."""
        try:
            text = (self.directory / "state" / "latest" / "run.json").read_text(encoding="utf-8")
            settings = json.loads(text)["settings"]
            if "steps" in settings:
                return int(settings["steps"])
            return int(settings["tokens"]) // int(settings["batch_size"])
        except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
            return None


def _ago(at: float) -> str:
    return f"{duration(max(0.0, time.time() - at))} ago"
