"""Where an input is cut for several machines: every record once, in order, groups whole."""

from __future__ import annotations

import random
from itertools import pairwise

import orjson
import pytest

from dlmctl.records.errors import UsageError
from dlmctl.records.groups import groups
from dlmctl.records.jsonl import read_records
from dlmctl.records.shards import Shard, cut, parse_shard, read_shard

COUNTS = (1, 2, 3, 5, 8, 40)


def shards(count: int) -> list[Shard]:
    return [Shard(number, count) for number in range(1, count + 1)]


def runs(draw: random.Random) -> list[tuple[int, int]]:
    """(group, place) of up to 30 items in groups of unequal size."""
    sizes = [draw.choice((1, 1, 2, 3, 7)) for _ in range(draw.randrange(12))]
    return [(group, place) for group, size in enumerate(sizes) for place in range(size)]


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("count", COUNTS)
def test_the_shards_of_any_input_are_all_of_it_with_groups_whole(seed, count):
    items = runs(random.Random(seed))
    parts = [list(cut(items, lambda i: i[0], len(items), shard)) for shard in shards(count)]
    assert [item for part in parts for item in part] == items
    owners = [{group for group, _ in part} for part in parts]
    assert sum(map(len, owners)) == len(set().union(*owners))


@pytest.mark.parametrize("count", COUNTS)
def test_shards_are_of_equal_size_but_for_a_group(count):
    for total, size in ((40, 1), (41, 1), (120, 6), (0, 1), (7, 7)):
        items = [n // size for n in range(total)]
        lengths = [len(list(cut(items, lambda i: i, total, shard))) for shard in shards(count)]
        assert max(lengths) - min(lengths) <= size
        assert all(length % size == 0 for length in lengths[:-1])


@pytest.mark.parametrize("total", [0, 3, 5, 29, 1000])
def test_a_wrong_count_loses_nothing(total):
    """As where lines are counted that are no records."""
    items = runs(random.Random(2))
    parts = [list(cut(items, lambda i: i[0], total, shard)) for shard in shards(4)]
    assert [item for part in parts for item in part] == items


def test_the_end_of_the_input_is_not_read_for_the_first_shard():
    read = []

    def items():
        for number in range(100):
            read.append(number)
            yield number

    assert list(cut(items(), lambda i: i, 100, Shard(1, 10))) == list(range(10))
    assert len(read) == 11


def test_bounds_are_those_of_a_list_cut_evenly():
    for total in range(30):
        for count in COUNTS:
            cuts = [shard.bounds(total) for shard in shards(count)]
            assert cuts[0][0] == 0
            assert cuts[-1][1] == total
            assert all(a[1] == b[0] for a, b in pairwise(cuts))
            assert {end - first for first, end in cuts} <= {total // count, -(-total // count)}


def line(draw: random.Random, group: int, sample: int) -> bytes:
    """A record of a group, sometimes one that groups pass over."""
    kind = draw.randrange(12)
    if kind == 0:
        return b"{not JSON\n"
    if kind == 1:
        return b'{"id": "other", "error": {"where": "", "message": ""}}\n'
    # A prompt that comes again in the next round is another group.
    record = {"id": f"p{group // 2}", "sample": sample, "rollout": {"round": group % 2}}
    return orjson.dumps(record) + draw.choice((b"\n", b"\n\n"))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("on_error", ["skip", "keep"])
def test_the_shards_of_files_are_the_records_of_all_files(tmp_path, seed, on_error):
    draw = random.Random(seed)
    lines = [line(draw, group, sample) for group in range(9) for sample in range(4)]
    end = draw.randrange(len(lines))
    files = []
    for name, part in (("a", lines[:end]), ("b", lines[end:])):
        (tmp_path / name).write_bytes(b"".join(part))
        files.append(str(tmp_path / name))
    whole = list(read_records(files, on_error))
    for count in (1, 2, 5, 60):
        parts = [list(read_shard(files, shard, on_error)) for shard in shards(count)]
        made = [record for part in parts for record in part]
        assert made == whole
        assert [r.where for r in made] == [r.where for r in whole]
        assert [group for part in parts for group in groups(part)] == list(groups(whole))


def test_records_without_an_id_are_groups_of_their_own(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"generation": "1"}\n' * 6 + b'{"id": "a", "rollout": null}\n' * 2)
    parts = [len(list(read_shard([str(path)], shard))) for shard in shards(4)]
    assert parts == [2, 2, 2, 2]


def test_a_line_that_is_no_record_fails_its_own_shard_alone(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2}\nnonsense\n{"id": 3}\n')
    assert [r["id"] for r in read_shard([str(path)], Shard(1, 4))] == [1]
    assert [r["id"] for r in read_shard([str(path)], Shard(4, 4))] == [3]
    with pytest.raises(Exception, match=r"in\.jsonl:3: not JSON"):
        list(read_shard([str(path)], Shard(2, 4)))


def test_the_shard_of_everything_is_everything(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"id": 1}\n{"id": 2}\n')
    assert parse_shard(None) is None
    assert list(read_shard([str(path)], None)) == list(read_shard([str(path)], Shard(1, 1)))


def test_shards_count_from_one():
    assert parse_shard("1/8") == Shard(1, 8)
    assert parse_shard("8/8") == Shard(8, 8)
    for text in ("0/8", "9/8", "1/0", "0/0"):
        with pytest.raises(UsageError, match="count from 1"):
            parse_shard(text)
    for text in ("3", "1/", "/8", "-1/8", "1.0/8", "a/b", "1/8/2", " 1/8", "\u0661/8", ""):
        with pytest.raises(UsageError, match="not I/N"):
            parse_shard(text)
