"""Groups of a stream: whole ones leave at once, the same prompt again is another group."""

from __future__ import annotations

import pytest

from dlmctl.records.errors import DataError
from dlmctl.records.groups import group_batches, groups, whole_groups
from dlmctl.records.jsonl import Record


def samples(prompt: str, count: int, of: int | None = None, **place: object) -> list[Record]:
    return [Record(id=prompt, rollout={**({"samples": of} if of else {}), **place})] * count


def sizes(records: list[Record]) -> list[tuple[str, int]]:
    return [(group[0]["id"], len(group)) for group in groups(records)]


def test_a_whole_group_leaves_before_the_next_record_is_read():
    """The next record of a training loop is sampled from weights that this group makes."""
    read: list[Record] = []

    def stream():
        for record in samples("a", 2, of=2) + samples("b", 2, of=2):
            read.append(record)
            yield record

    assert len(next(groups(stream()))) == 2
    assert len(read) == 2


def test_groups_of_unknown_size_end_at_another_prompt():
    assert sizes(samples("a", 2) + samples("b", 1)) == [("a", 2), ("b", 1)]


def test_a_prompt_that_comes_again_is_another_group():
    assert sizes(samples("a", 4, of=2)) == [("a", 2), ("a", 2)]
    stream = samples("a", 1, round=0) + samples("a", 1, round=1)
    assert sizes(stream) == [("a", 1), ("a", 1)]


def test_groups_that_lack_samples_and_records_with_an_error():
    stream = [*samples("a", 1, of=3), Record(id="a", error={}), *samples("b", 3, of=3)]
    assert sizes(stream) == [("a", 1), ("b", 3)]


def test_batches_have_whole_groups_and_end_with_the_round():
    stream = samples("a", 2, 2, round=0, round_size=6) + samples("b", 2, 2, round=0, round_size=6)
    stream += samples("c", 2, 2, round=0, round_size=6) + samples("d", 2, 2, round=1, round_size=2)
    made = ["".join(record["id"] for record in batch) for batch in group_batches(stream, 3)]
    assert made == ["aabb", "cc", "dd"]
    read: list[Record] = []

    def watched():
        for record in stream:
            read.append(record)
            yield record

    assert len(next(group_batches(watched(), 100))) == 6
    assert len(read) == 6


def test_batches_of_a_plain_stream_and_records_with_an_error():
    error = Record(id="a", error={}, rollout={"round": 0, "round_size": 3})
    stream = [error, *samples("a", 2, 2, round=0, round_size=3), *samples("b", 1)]
    assert [len(batch) for batch in group_batches(stream, 9)] == [3, 1]
    assert [len(batch) for batch in group_batches(samples("a", 2) + samples("b", 2), 9)] == [4]


def test_whole_groups_have_their_errors_and_leave_with_the_last_sample():
    failed = [Record(r, error={}) for r in samples("a", 3, of=3)[1:]]
    stray = Record(line="{", error={})
    strange = Record(id=[], rollout={"samples": "x", "round_size": 0.5}, error={})
    stream = [strange, *samples("a", 1, of=3), stray, *failed, stray, *samples("b", 2, of=2)]
    read: list[Record] = []

    def watched():
        for record in stream:
            read.append(record)
            yield record

    found = []
    for group in whole_groups(watched()):
        found.append(["error" if "error" in record else record["id"] for record in group])
        assert sum(map(len, found)) == len(read)  # none waits for the record behind it
    assert found == [["error"], ["a", "error", "error", "error"], ["error"], ["b", "b"]]
    assert sizes(stream) == [("a", 1), ("b", 2)]


def test_a_size_that_is_no_number_is_refused():
    with pytest.raises(DataError, match=r"'rollout\.samples' is str, expected int"):
        list(groups([Record(id="a", rollout={"samples": "x"})]))
    with pytest.raises(DataError, match=r"'rollout\.round_size' is float, expected int"):
        list(group_batches([Record(id="a", rollout={"round_size": 2.5})], 1))
