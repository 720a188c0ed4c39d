"""Standard input line by line, while watching the reader of standard output.

A stage in the middle of a pipe that waits for input, and so writes nothing, would not notice that
the stage behind it has ended. Here it does, so that the end of any stage ends the whole pipe.
"""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator

BLOCK = 2**16


def stdin_lines() -> Iterator[bytes]:
    """Lines of standard input with their ends, as they arrive.

    Raises:
        BrokenPipeError: nobody reads standard output any more.
    """
    try:
        source = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: in a test or an embedding program
        yield from sys.stdin.buffer
        return
    poll = _watch(source)
    rest = b""
    while True:
        if poll is not None:
            _wait(poll, source)
        block = os.read(source, BLOCK)
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = _watch(None)
    return poll is not None and any(_broken(event) for _, event in poll.poll(0))


def _watch(source: int | None) -> select.poll | None:
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if source is not None:
            poll.register(source, select.POLLIN)
    except (OSError, ValueError, AttributeError):
        return None
    return poll


def _wait(poll: select.poll, source: int) -> None:
    """Return when there is something to read, or the end."""
    while True:
        for descriptor, event in poll.poll():
            if descriptor == source:
                return
            if _broken(event):
                raise BrokenPipeError


def _broken(event: int) -> bool:
    return bool(event & (select.POLLERR | select.POLLNVAL))
