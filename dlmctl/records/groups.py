"""Groups: the samples of one prompt, contiguous in the stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator

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


def group_batches(records: Iterable[Record], size: int) -> Iterator[list[list[Record]]]:
    """Groups of at least `size` records together, at most to the end of a round of a training loop.

    Within a round nothing waits for what comes behind it.
    """
    batch: list[Record] = []
    seen = 0
    for record in records:
        if "error" not in record:
            if len(batch) >= size and group_key(batch[-1]) != group_key(record):
                yield list(groups(batch))
                batch = []
            batch.append(record)
        seen += 1
        whole_round = object_field(record, "rollout").get("round_size")
        if isinstance(whole_round, int) and seen >= whole_round:
            yield list(groups(batch))
            batch, seen = [], 0
    if batch:
        yield list(groups(batch))


def group_size(record: Record) -> int | None:
    """How many samples the group of this record has, where `rollout` wrote it."""
    samples: int | None = object_field(record, "rollout").get("samples")
    return samples
