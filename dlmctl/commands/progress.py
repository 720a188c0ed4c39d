"""Progress of a command on standard error.

On a terminal, the last stage of a pipe redraws a line. Elsewhere, as in a log of cron or Slurm, the
command writes a line a minute, so that short commands write nothing:

    dlmctl rollout: 340 of 1,200 samples, 5.6/s, 2 min 34 s left

The package rich.progress does not fit: it hides the cursor, which a killed command leaves hidden,
redraws over what other stages of the pipe write, and has no form for logs.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from dlmctl.commands.input_lines import Lines
from dlmctl.records import interrupts, stderr
from dlmctl.report.times import duration, pace

T = TypeVar("T")
Total = int | Lines | None
"""Number of items in all: known, derived from the length of the input, or unknown."""

DRAWN_S = 0.5
"""Seconds between drawings of the line on a terminal."""
WRITTEN_S = 60.0
"""Seconds between lines elsewhere."""


def counted(
    items: Iterable[T],
    what: str,
    quiet: bool,
    total: Total = None,
    done: int = 0,
    at: Callable[[T], int] | None = None,
    figures: Sequence[str] = (),
) -> Iterator[T]:
    """Pass items through and show how many there were, at which rate, and the time left.

    Args:
        what: name of the items, in the plural.
        total: number of items in all, including those done before.
        done: number of items done before, as when resuming; not part of the rate.
        at: number of items done after an item; None counts them one by one.
        figures: fields of an item to show with the count, if it has them.
    """
    with counting(what, quiet, total, done) as gauge:
        for item in items:
            yield item
            gauge.reach(gauge.count + 1 if at is None else at(item), _chosen(item, figures))


@contextlib.contextmanager
def counting(what: str, quiet: bool, total: Total = None, done: int = 0) -> Iterator[Gauge]:
    """A gauge that the block tells its progress; see `counted`."""
    gauge = Gauge(what, total, done)
    way = None if quiet else _way()
    if way is None:
        yield gauge
        return
    ended = threading.Event()
    say, seconds = (_draw, DRAWN_S) if way == "drawn" else (_write, WRITTEN_S)

    def speak() -> None:
        while not ended.wait(seconds):
            say(gauge, ended)

    threading.Thread(target=speak, daemon=True).start()
    try:
        yield gauge
    finally:
        ended.set()
        with stderr.aside():  # erases the line
            pass


class Gauge:
    """How much is done, of how much, since when."""

    def __init__(
        self,
        what: str,
        total: Total = None,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._before = self.count = done
        self._began = self._reached = clock()
        self._figures: Mapping[str, float] = {}

    def reach(self, count: int, figures: Mapping[str, float] | None = None) -> None:
        """Set how many are done, and the figures of the last of them."""
        self.count, self._reached = count, self._clock()
        self._figures = figures or self._figures

    def advance(self, by: int = 1) -> None:
        """Count this many more as done."""
        self.reach(self.count + by)

    def text(self, width: int | None = None) -> str:
        """The progress in one line.

        Args:
            width: of the terminal; the least important parts are left out to fit. None is a line of
                a log.
        """
        total, about = self._whole()
        known = total is not None and total >= self.count
        parts = [f"{self.count:,} of {about}{total:,}" if known else f"{self.count:,}"]
        parts[0] += f" {self._what}"
        now, left = self._clock(), 0.0
        new, took = self.count - self._before, self._reached - self._began
        if known and width is not None:
            parts.append(f"{int(100 * self.count / max(1, total or 0))} %")
        if new > 0 and took > 0:
            parts.append(pace(new / took))
            if known:
                left = ((total or 0) - self.count) * took / new - (now - self._reached)
        if left >= 0.5:  # not if it takes longer than estimated
            parts.append(f"{duration(left)} left")
        if width is not None or left < 0.5:
            parts.append(f"{duration(now - self._began)} so far")
        parts += [f"{name} {value:.3g}" for name, value in self._figures.items()]
        while width is not None and len(", ".join(parts)) >= width and len(parts) > 1:
            parts.pop()
        return ", ".join(parts)[:width]

    def _whole(self) -> tuple[int | None, str]:
        """The total, and `about ` if it is an estimate."""
        if isinstance(self._total, Lines):
            count = self._total.count()
            return (None, "") if count is None else (count[0], "" if count[1] else "about ")
        return self._total, ""


def times(total: Total, factor: float) -> Total:
    """A total in another unit, rounded up."""
    if isinstance(total, Lines):
        return total.times(factor)
    return None if total is None else -int(-total * factor // 1)


def _way() -> str | None:
    """How progress is shown here: drawn, written, or None."""
    if os.environ.get("RANK", "0") != "0":  # torchrun: the first rank speaks for all
        return None
    if not sys.stderr.isatty():
        return "written"
    try:
        piped = stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        piped = False
    if piped:  # the line of the next stage would be drawn over this one
        return None
    return "drawn" if stderr.has_codes() else "written"


def _draw(gauge: Gauge, ended: threading.Event) -> None:
    stderr.draw(gauge.text(stderr.columns() or 80), lambda: not ended.is_set())


def _write(gauge: Gauge, ended: threading.Event) -> None:
    line = f"dlmctl {interrupts.command()}: {gauge.text()}\n"
    if not ended.is_set():
        sys.stderr.write(line)


def _chosen(item: Any, figures: Sequence[str]) -> dict[str, float]:
    if not figures or not isinstance(item, Mapping):
        return {}
    return {name: item[name] for name in figures if isinstance(item.get(name), (int, float))}
