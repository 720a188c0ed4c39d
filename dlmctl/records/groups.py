"""Groups: the samples of one prompt, contiguous in the stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field, object_field


def group_key(record: Record) -> Hashable:
    """Identity of the group: the prompt's id, and round and order where there are several."""
    place = object_field(record, "rollout")
    return field(record, "id", (str, int)), place.get("round"), place.get("remasking")


def groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of neighbouring records that share `id` (and round); records with `error` left out.

    A group leaves as soon as it has as many samples as `rollout` says: in a training loop the next
    record comes only after this group has been trained on.
    """
    group: list[Record] = []
    for record in records:
        if "error" in record:
            continue
        if group and group_key(group[0]) != group_key(record):
            yield group
            group = []
        group.append(record)
        if len(group) == group_size(record):
            yield group
            group = []
    if group:
        yield group


class BatchEnds:
    """Where the batches of `group_batches` begin and end; told of each record in order."""

    def __init__(self, size: int) -> None:
        self._size, self._count, self._seen = size, 0, 0
        self._last: Record | None = None
        self.round_done = False
        """Whether the last record was that of a whole round of a training loop."""

    def begins(self, record: Record) -> bool:
        """Whether a batch begins with this record, the next one."""
        begins = self._last is None and not self._seen
        if self._last is not None and "error" not in record and self._count >= self._size:
            begins = group_key(self._last) != group_key(record)
        if begins:
            self._count = 0
        if "error" not in record:
            self._count, self._last = self._count + 1, record
        self._seen += 1
        whole_round = object_field(record, "rollout").get("round_size")
        self.round_done = isinstance(whole_round, int) and self._seen >= whole_round
        if self.round_done:
            self._count, self._seen, self._last = 0, 0, None
        return begins


def group_batches(records: Iterable[Record], size: int) -> Iterator[list[list[Record]]]:
    """Groups of at least `size` records together, at most to the end of a round of a training loop.

    Within a round nothing waits for what comes behind it.
    """
    batch: list[Record] = []
    ends = BatchEnds(size)
    for record in records:
        if ends.begins(record) and batch:
            yield list(groups(batch))
            batch = []
        if "error" not in record:
            batch.append(record)
        if ends.round_done:
            yield list(groups(batch))
            batch = []
    if batch:
        yield list(groups(batch))


def group_size(record: Record) -> int | None:
    """How many samples the group of this record has, where `rollout` wrote it."""
    samples: int | None = object_field(record, "rollout").get("samples")
    if samples is not None and type(samples) is not int:
        kind = type(samples).__name__
        raise DataError(f"field 'rollout.samples' is {kind}, expected int", record.where)
    return samples
