"""A process that reads metrics.jsonl while a run writes it, and sends what is new to a tracker.

Clients of trackers write to standard output, ask on the terminal, wait for servers, and have
threads and signal handlers. In a process of their own they do none of this to the training, and the
file of metrics is the queue: what a tracker did not take is sent when it answers again, or when the
run is resumed. The process ends once the trainer has, in whatever way, and the rest is sent.

Steps that were lost with a trainer, and are taken again, are not sent again: a tracker keeps the
numbers that it was sent first.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dlmctl.records.errors import TryAgainError, reason_of
from dlmctl.records.files import make_directory
from dlmctl.records.locks import Lock, hold
from dlmctl.records.stderr import ERASE, has_codes
from dlmctl.report.metrics_tail import METRICS, MetricsTail, line_of, numbers_of
from dlmctl.report.trackers import KINDS, Memory, Tracker

POLL_S = 0.5
"""Seconds between looks at the file."""
FIRST_WAIT_S, LONGEST_WAIT_S = 10.0, 300.0
"""Seconds after a failure until the tracker is tried again: at first, and at most."""
DONE = b"done\n"
"""What the trainer says when it has ended by itself."""
END_S = 60.0
"""How long a former follower of the run is waited for, once the trainer has ended."""


class Follower:
    """Sends the records of a run to a tracker, each once, in their order."""

    def __init__(
        self, name: str, directory: Path, about: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        self._name, self._about, self._say = name, about, say
        self._tail = MetricsTail(directory)
        self._memory = Memory(directory, name)
        self._tracker: Tracker | None = None
        self._failed = self._announced = False
        self._wait, self._due = FIRST_WAIT_S, 0.0

    def catch_up(self, last: bool = False) -> None:
        """Send what is new; a failure is said once, and tried again later.

        Args:
            last: try once more, however short ago the tracker failed.
        """
        if time.monotonic() < self._due and not last:
            return
        try:
            while not self._send():
                pass
        except Exception as error:
            self._fail(error, last)
            return
        if self._failed and self._tracker is not None:
            self._say(f"{self._name} takes metrics again; none is missing")
            self._failed, self._wait = False, FIRST_WAIT_S

    def close(self, whole: bool) -> None:
        """Send what the client still has, and end the tracked run."""
        try:
            if self._tracker is not None:
                self._tracker.close(whole)
        except Exception as error:
            self._fail(error, last=True)

    def _send(self) -> bool:
        """Send records until the end of the file; False: begin again, with what the tracker has."""
        for record, end in self._tail.records():
            line, step = line_of(record), record["step"]
            numbers = numbers_of(record)
            if step > self._memory.steps.get(line, -1) and numbers:
                if self._tracker is None:
                    self._open()
                    return False
                self._tracker.add(line, step, numbers)
                self._memory.steps[line] = step
                self._memory.save()
            self._tail.offset = end
        return True

    def _open(self) -> None:
        self._tracker = KINDS[self._name](self._memory, self._about)
        self._tail.offset = 0
        if self._announced:
            return
        self._announced = True
        self._say(f"{self._name}: {self._tracker.where}")
        now: dict[str, int] = {}
        for record, _ in self._tail.records():
            now[line_of(record)] = record["step"]
        ahead = [step for line, step in self._memory.steps.items() if step >= now.get(line, -1)]
        if ahead and now:
            self._say(
                f"{self._name} has steps up to {max(ahead)}, sent before the run was stopped: they "
                "are not sent again"
            )

    def _fail(self, error: Exception, last: bool) -> None:
        reason = reason_of(error)
        if not self._failed:
            later = "when the run is resumed" if last else "later"
            self._say(
                f"{self._name} takes no metrics ({reason[:200]}); training goes on, {METRICS} has "
                f"them, and they are sent {later}"
            )
        self._failed, self._tracker = True, None
        self._due = time.monotonic() + self._wait
        self._wait = min(2 * self._wait, LONGEST_WAIT_S)


def follow(name: str, directory: Path, say: Callable[[str], None]) -> None:
    """Follow a run until the trainer, which holds the other end of standard input, has ended."""
    line, ended = b"", False
    while not line.endswith(b"\n"):  # byte by byte: a buffer would hide from `select` what it has
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    about = json.loads(line)
    lock: Lock | None = None
    until = float("inf")
    while lock is None:
        # A trainer that was killed leaves a follower, which may still be sending.
        lock = _lock(directory, name)
        if lock is None:
            ended = ended or select.select([0], [], [], POLL_S)[0] != []
            until = min(until, time.monotonic() + END_S) if ended else until
            if time.monotonic() > until:
                say(f"{name}: another process sends the metrics of {directory}")
                return
    follower = Follower(name, directory, about, say)
    while not ended:
        follower.catch_up()
        ended = select.select([0], [], [], POLL_S)[0] != []
    follower.catch_up(last=True)
    follower.close(os.read(0, len(DONE)) == DONE)


def _lock(directory: Path, name: str) -> Lock | None:
    make_directory(directory / "trackers")
    path = directory / "trackers" / f".{name}.lock"
    try:
        lock = hold(path, str(directory))
    except TryAgainError:
        return None
    lock.remove_with(path)
    return lock


def main() -> None:
    """`NAME RUN` as arguments, and as the first line of standard input the settings of the run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends when the trainer has ended
    own, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    start = ERASE if os.isatty(own) and has_codes() else b""

    def say(text: str) -> None:
        with contextlib.suppress(OSError):
            os.write(own, start + f"dlmctl: {text}\n".encode(errors="backslashreplace"))

    name, directory = sys.argv[-2:]
    try:
        follow(name, Path(directory), say)
    except Exception as error:
        say(f"{name} is sent no metrics ({type(error).__name__}: {error}); {METRICS} has them")
