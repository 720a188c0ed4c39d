"""Groups: the samples of one prompt, contiguous in the stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from itertools import groupby

from dlmctl.records.jsonl import Record, field


def group_key(record: Record) -> Hashable:
    """Identity of the group: the prompt's id, and round and order where there are several."""
    place = record.get("rollout", {})
    return field(record, "id", (str, int)), place.get("round"), place.get("remasking")


def groups(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Lists of neighbouring records that share `id` (and round); records with `error` left out."""
    sound = (record for record in records if "error" not in record)
    for _, members in groupby(sound, key=group_key):
        yield list(members)


def group_size(record: Record) -> int | None:
    """How many samples the group of this record has, where `rollout` wrote it."""
    return record.get("rollout", {}).get("samples")
