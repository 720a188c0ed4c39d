"""One measurement after the other, within a budget of time and what memory there is."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch._dynamo.exc import TorchDynamoException

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.records.errors import UnavailableError

NO_MEMORY = "out of memory"


class LeftOutError(Exception):
    """Something is not measured, for this reason."""


@dataclass(frozen=True)
class Measurement:
    """Some work that is to be timed."""

    unit: str
    amount: float
    """How many units the work has; the figure is this divided by its seconds."""
    work: Callable[[], Mapping[str, Any] | None]
    """Does it; may return further fields of the record."""
    warm_up: Callable[[], object]
    """Less of the same work. It runs twice: to allocate and compile everything, and to estimate
    how long the work takes."""
    ratio: float
    """How many times as much the work is."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    flops: float | None = None
    """Operations of the work, if they are known."""


class Prepared(NamedTuple):
    """What is measured next."""

    what: str
    prepare: Callable[[], Measurement]
    """Makes the measurement, which may need memory too."""
    share: float = 1.0
    """Of the budget, by the end of which it must be done: the rest is for what follows."""


class Timed(NamedTuple):
    seconds: float
    peak_memory_mb: float | None
    more: Mapping[str, Any]


class Stopwatch:
    """Times work on a device until its seconds are over."""

    def __init__(
        self, device: torch.device, seconds: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.device, self.clock = device, clock
        self.begun, self.seconds = clock(), seconds

    def timed(self, one: Measurement, share: float) -> Timed:
        """Warm up, then do the work, within this share of the seconds.

        Raises:
            LeftOutError: the time is over, or too short for the work.
        """
        self._check(share)
        one.warm_up()
        synchronize(self.device)
        self._check(share)
        estimate = one.ratio * self._seconds(one.warm_up)[0]
        self._check(share, estimate)
        with Peak(self.device) as peak:
            seconds, more = self._seconds(one.work)
        return Timed(seconds, peak.megabytes, more or {})

    def _seconds(self, work: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(self.device)
        begun = self.clock()
        result = work()
        synchronize(self.device)
        return self.clock() - begun, result

    def _check(self, share: float, needed: float = 0.0) -> None:
        left = self.begun + share * self.seconds - self.clock()
        if left <= 0:
            raise LeftOutError("its part of --seconds was over")
        if needed > left:
            raise LeftOutError(
                f"it takes about {needed:.0f} s, and {left:.0f} s are left of its part of --seconds"
            )


def measured(
    prepared: Iterable[Prepared], stopwatch: Stopwatch, about: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """A record of each measurement; one that cannot be made has no value, and `left_out` says why.

    Args:
        about: what all records say: model, device.
    """
    for what, prepare, share in prepared:
        record: dict[str, Any] = {"what": what, "value": None}
        one = None
        try:
            one = prepare()
            record |= {"unit": one.unit, **one.settings}
            timed = stopwatch.timed(one, share)
        except (LeftOutError, UnavailableError, TorchDynamoException, RuntimeError) as error:
            record["left_out"] = reason(error)
        else:
            record["value"] = one.amount / timed.seconds
            record["seconds"] = timed.seconds
            if one.flops is not None:
                record["tflops"] = one.flops / timed.seconds / 1e12
            record |= {"peak_memory_mb": timed.peak_memory_mb, **timed.more}
        del one, prepare
        free_memory(stopwatch.device)  # out of the handler, which holds what did not fit
        yield record | dict(about)


def reason(error: Exception) -> str:
    """Why something was not measured; raises the error again if it is none of the known ones."""
    if isinstance(error, LeftOutError | UnavailableError):
        return str(error)
    if isinstance(error, TorchDynamoException):
        lines = str(error).strip().split("\n")
        return f"torch.compile failed: {lines[0][:200]}"
    # On the CPU torch has no class for it.
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return NO_MEMORY
    raise error


def free_memory(device: torch.device) -> None:
    """Return to the device what nothing uses."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
