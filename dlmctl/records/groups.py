"""Groups: the samples of one prompt, contiguous in the stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field, object_field


def group_key(record: Record) -> Hashable:
    """Identity of the group: the prompt's id, and round and order if there are several."""
    rollout = object_field(record, "rollout")
    return field(record, "id", (str, int)), rollout.get("round"), rollout.get("remasking")


def groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of neighbouring records that share `id` (and round), without those with `error`."""
    return without_errors(whole_groups(records))


def without_errors(groups: Iterable[Sequence[Record]]) -> Iterator[list[Record]]:
    """The groups without records that have an `error`; drops groups that become empty."""
    for group in groups:
        sound = [record for record in group if "error" not in record]
        if sound:
            yield sound


def whole_groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Groups that include the records with an `error`, all in their order.

    A group is yielded as soon as it has as many samples as `rollout` says, failed ones included: in
    a training loop, the next record arrives only after this group has been trained on. An error
    that does not say which sample it was is no sample, and goes with the group before it.
    """
    group: list[Record] = []
    samples, key = 0, None
    for record in records:
        if not is_sample(record):
            if group:
                group.append(record)
            else:
                yield [record]
            continue
        now = group_key(record)
        if group and now != key:
            yield group
            group, samples = [], 0
        key = now
        group.append(record)
        samples += 1
        if samples == group_size(record):
            yield group
            group, samples = [], 0
    if group:
        yield group


def is_whole(group: Sequence[Record]) -> bool:
    """Whether one of `whole_groups` has as many samples as `rollout` says."""
    sizes = [group_size(record) for record in group if is_sample(record)]
    return bool(sizes) and len(sizes) == sizes[0]


def is_sample(record: Record) -> bool:
    """Whether a record is a sample of a group; one with an `error` may be anything."""
    if "error" not in record:
        return True
    rollout = record.get("rollout")
    sized = isinstance(rollout, dict) and type(rollout.get("samples")) is int
    return sized and type(record.get("id")) in (str, int)


class BatchEnds:
    """Where the batches of `group_batches` begin and end; it is told each record, in order."""

    def __init__(self, size: int) -> None:
        self._size, self._count, self._seen = size, 0, 0
        self._last: Record | None = None
        self.round_done = False
        """Whether the last record completed a round of a training loop."""

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
        whole_round = round_size(record) if is_sample(record) else None
        self.round_done = whole_round is not None and self._seen >= whole_round
        if self.round_done:
            self._count, self._seen, self._last = 0, 0, None
        return begins


def group_batches(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Whole groups of at least `size` records together; a training round ends a batch.

    Records with an `error` keep their places, and do not count. The last batch of a round does not
    wait for the record behind it.
    """
    batch: list[Record] = []
    ends = BatchEnds(size)
    for record in records:
        if ends.begins(record) and batch:
            yield batch
            batch = []
        batch.append(record)
        if ends.round_done:
            yield batch
            batch = []
    if batch:
        yield batch


def group_size(record: Record) -> int | None:
    """How many samples the group of this record has, if `rollout` wrote it."""
    return _count(record, "samples")


def round_size(record: Record) -> int | None:
    """How many completions this record's round of a training loop has, if it is of one."""
    return _count(record, "round_size")


def _count(record: Record, name: str) -> int | None:
    number: int | None = object_field(record, "rollout").get(name)
    if number is not None and type(number) is not int:
        kind = type(number).__name__
        raise DataError(f"field 'rollout.{name}' is {kind}, expected int", record.where)
    return number
