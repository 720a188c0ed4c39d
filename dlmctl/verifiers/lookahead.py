"""Records in windows, for verifiers that judge several at once: by a server, or in a batch.

Such a verifier sees the records of a window before it is asked for the verdict on each. A window
has a fixed number of records, and does not wait for those behind the end of a round of a training
loop, which come only after this round has been trained on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from dlmctl.records.errors import DataError
from dlmctl.records.groups import is_sample, round_size
from dlmctl.records.jsonl import Record
from dlmctl.verifiers.answer import Verdict
from dlmctl.verifiers.evaluations import from_evaluation


class LooksAhead(Protocol):
    """A verifier that judges several records at once."""

    window: int
    """How many records it looks at."""

    def look(self, records: Sequence[Record]) -> None:
        """Prepare the verdicts of these records; what fails is raised when one is asked for."""

    def __call__(self, record: Mapping[str, Any]) -> Verdict:
        """The verdict of a record, even if it was not looked at."""

    def close(self) -> None:
        """Release what it holds."""


def looked_ahead(records: Iterable[Record], verifiers: Sequence[LooksAhead]) -> Iterator[Record]:
    """The records, each after the verifiers have looked at its window."""
    if not verifiers:
        yield from records
        return
    for window in windows(records, max(verifier.window for verifier in verifiers)):
        sound = []
        for record in window:
            if "error" not in record:
                with contextlib.suppress(DataError):  # raised again when it is judged
                    sound.append(from_evaluation(record))
        for verifier in verifiers:
            verifier.look(sound)
        yield from window


def windows(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Lists of `size` records; the last of a round and of the stream may have fewer.

    Records before one that cannot be read come first.
    """
    window: list[Record] = []
    seen = 0
    try:
        for record in records:
            window.append(record)
            seen += 1
            whole = _round(record)
            if whole is not None and seen >= whole:
                seen = 0
            elif len(window) < size:
                continue
            yield window
            window = []
    except DataError:
        if window:
            yield window
        raise
    if window:
        yield window


def _round(record: Record) -> int | None:
    """How many records its round has; None if it is of none, or does not say it rightly."""
    try:
        return round_size(record) if is_sample(record) else None
    except DataError:
        return None
