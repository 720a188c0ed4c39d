"""Groups of a stream: whole ones leave at once, the same prompt again is another group."""

from __future__ import annotations

from dlmctl.records.groups import groups
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
