"""A subcommand that torchrun starts in several processes: one of them talks, and all of them end.

torchrun --nproc-per-node 4 -m dlmctl update …
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

from dlmctl.commands.progress import Total, counted
from dlmctl.records.errors import UsageError, UserFacingError
from dlmctl.records.jsonl import write_records
from dlmctl.settings.compute import Device

SILENCE_S = 30.0
"""How long a rank that failed leaves it to the first one to say why."""

MARK = "runs_on_every_rank"
"""What tells the command line that a subcommand may be started in several processes."""


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def on_every_rank(function: Callable[..., None]) -> Callable[..., None]:
    """Let a subcommand with a `--device` run under torchrun; elsewhere it is as it was."""

    setattr(function, MARK, True)  # wraps copies it

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        if not several():
            return function(*args, **kwargs)
        if kwargs.get("resume"):
            raise UsageError(
                "--resume passes over input in one process only: leave it out under torchrun, and "
                "give the input that is left"
            )
        import typer

        from dlmctl.train.distributed import RankError, joined

        try:
            with joined(_device(kwargs)):
                function(*args, **kwargs)
        except UserFacingError as error:
            number = int(os.environ["RANK"])
            if number == 0:
                raise
            if error.exit_code:
                # Nearly always the first rank has failed as well and says so: torchrun ends us.
                time.sleep(SILENCE_S)
            if isinstance(error, RankError):
                raise typer.Exit(error.exit_code) from None
            mine = UserFacingError(f"rank {number}: {error}")
            mine.exit_code = error.exit_code
            raise mine from None

    return run


def _device(kwargs: Mapping[str, Any]) -> str:
    """What --device says, by itself or among the settings."""
    among = (value.device for value in kwargs.values() if isinstance(value, Device))
    return str(kwargs.get("device") or next(among))


def write_metrics(
    metrics: Generator[Any, None, None],
    quiet: bool,
    standing: Callable[[], str],
    total: Total,
    done: int = 0,
    at: Callable[[], int] | None = None,
) -> None:
    """Write the records that every rank makes of its steps, once.

    Args:
        standing: what is said where the command is interrupted.
        total: steps that there will be, with those that were `done` before.
        at: how many are done now; None is one for each record.
    """
    place = None if at is None else lambda _: at()

    def shown(records: Iterable[Any]) -> Iterator[Any]:
        figures = ("reward", "loss", "fve")
        return counted(records, "steps", quiet, total, done, place, figures)

    if not several():
        write_records(shown(metrics), standing=standing)
        return
    from dlmctl.train.distributed import in_step, is_first

    with contextlib.closing(in_step(metrics)) as records:
        if is_first():
            write_records(shown(records), standing=standing)
        else:
            for _ in records:
                pass
