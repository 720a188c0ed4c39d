"""Lines of files over and over, each time in another order, within bounded memory."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, Record, parse_lines, read_lines

T = TypeVar("T")


def read_passes(
    files: Sequence[str], on_error: OnError, epochs: int, window: int, seed: int
) -> Iterator[Record]:
    """Records of JSONL files in every epoch; no file, or `-`, is standard input.

    Args:
        window: records among which they are mixed; 1 keeps the order.

    Raises:
        UsageError: there are several epochs, and an input that can be read only once.
        MissingInputError, DataError: as `read_records`.
    """
    for name in files or ["-"]:
        if epochs > 1 and not _again(name):
            what = "standard input" if name == "-" else name
            raise UsageError(f"--epochs {epochs} needs files, and {what} can be read once")
    return parse_lines(_lines(files, epochs, window, seed), on_error)


def _lines(
    files: Sequence[str], epochs: int, window: int, seed: int
) -> Iterator[tuple[str, bytes]]:
    for epoch in range(epochs):
        draw = random.Random(f"passes/{seed}/{epoch}")
        yield from shuffled(read_lines(files), window, draw)


def shuffled(items: Iterable[T], window: int, draw: random.Random) -> Iterator[T]:
    """The items in a random order, with at most `window` of them in memory; 1 keeps the order.

    An item leaves whenever one comes in, so that it comes out at most `window` - 1 places early;
    with a window of all items, every order is as likely.
    """
    held: list[T] = []
    for item in items:
        if len(held) < window - 1:
            held.append(item)
            continue
        place = draw.randrange(window)
        if place < len(held):
            held[place], item = item, held[place]
        yield item
    draw.shuffle(held)
    yield from held


def _again(name: str) -> bool:
    try:
        return name != "-" and stat.S_ISREG(os.stat(name).st_mode)
    except OSError:
        return True  # reading it says what is wrong
