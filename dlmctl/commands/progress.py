"""A count on standard error while a stage runs, shown by the last stage of a pipe."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def counted(items: Iterable[T], what: str, quiet: bool) -> Iterator[T]:
    """Pass items through and show how many there were and how fast they come."""
    if quiet or not sys.stderr.isatty() or _writes_into_a_pipe():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description} {task.completed}"),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    shared = sys.stdout.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(what, total=None, rate="")
        for item in items:
            if shared:  # the item is about to be written where the count stands
                progress.stop()
            yield item
            if shared:
                progress.start()
            speed = progress.tasks[task].speed
            progress.update(task, advance=1, rate=f"{speed:.1f}/s" if speed else "")


def _writes_into_a_pipe() -> bool:
    """Whether another stage follows, whose count would be drawn over this one."""
    try:
        return stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode)
    except (OSError, ValueError, AttributeError):
        return False
