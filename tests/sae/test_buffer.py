"""The shuffle buffer gives every row once, in an order that the seed decides."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor

from dlmctl.records.errors import UsageError
from dlmctl.sae.training.buffer import ShuffleBuffer, distinct, share_of_memory
from dlmctl.settings.sae import Feed


def _rows(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 3).clone()


def _buffer(rows: int, seed: int) -> ShuffleBuffer:
    return ShuffleBuffer(rows, seed)


def _drawn(buffer: ShuffleBuffer, sizes: list[int]) -> list[list[int]]:
    return [buffer.draw(size)[:, 0].int().tolist() for size in sizes]


def test_every_row_comes_out_once() -> None:
    buffer = _buffer(10, seed=1)
    buffer.add(_rows(0, 8))
    first = _drawn(buffer, [3, 2])
    buffer.add(_rows(8, 9))  # beyond the capacity
    rest = _drawn(buffer, [5, 5, 5])
    assert sorted(n for part in first + rest for n in part) == list(range(17))
    assert len(buffer) == 0
    assert all(n < 8 for part in first for n in part)


def test_draws_are_uniform_over_what_is_there() -> None:
    counts = torch.zeros(20)
    for seed in range(2000):
        buffer = _buffer(20, seed)
        buffer.add(_rows(0, 20))
        buffer.draw(7)
        counts[buffer.draw(5)[:, 0].long()] += 1
    expected = 2000 * 5 / 20
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_a_state_gives_the_same_draws() -> None:
    buffer, other = _buffer(10, seed=1), _buffer(10, seed=2)
    buffer.add(_rows(0, 10))
    buffer.draw(3)
    other.restore(buffer.state(), "cpu")
    assert _drawn(other, [2, 4]) == _drawn(buffer, [2, 4])


def test_rows_can_be_dropped() -> None:
    buffer = _buffer(10, seed=1)
    buffer.add(_rows(0, 10))
    buffer.keep(buffer.rows[:, 0] % 3 == 0)
    assert sorted(_drawn(buffer, [9])[0]) == [0, 3, 6, 9]


def test_a_draw_moves_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an order of the whole buffer for each batch."""
    buffer = _buffer(1000, seed=1)
    buffer.add(_rows(0, 1000))
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: pytest.fail("of the whole buffer"))
    drawn = [n for part in _drawn(buffer, [100] * 8) for n in part]
    assert len(set(drawn)) == 800
    assert sorted(drawn + buffer.rows[:, 0].int().tolist()) == list(range(1000))


@pytest.mark.parametrize("count", [2, 3])  # 3 of 5 are the first of a permutation
def test_all_orders_of_distinct_numbers_are_equally_likely(count: int) -> None:
    generator, tries = torch.Generator().manual_seed(0), 6_000
    counts = Counter(tuple(distinct(count, 5, generator).tolist()) for _ in range(tries))
    orders = list(itertools.permutations(range(5), count))
    expected = tries / len(orders)
    chi_squared = sum((counts[order] - expected) ** 2 / expected for order in orders)
    assert set(counts) == set(orders)
    # Its mean is f = len(orders) - 1 and its variance 2 f.
    freedom = len(orders) - 1
    assert abs(chi_squared - freedom) < 5 * (2 * freedom) ** 0.5


def test_as_many_distinct_numbers_as_there_are_is_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 7):
        assert sorted(distinct(size, size, generator).tolist()) == list(range(size))


def test_where_the_rows_are_decides_nothing() -> None:
    """On `meta` there is no data, but the same storage is asked for as on another device."""
    here, host = ShuffleBuffer(10, seed=1), ShuffleBuffer(10, seed=1, on_host=True)
    for buffer in (here, host):
        buffer.add(_rows(0, 12))
    assert _drawn(here, [3, 4]) == _drawn(host, [3, 4])
    assert torch.equal(here.first(2), here.rows[:2])
    for on_host, kept in ((False, "meta"), (True, "cpu")):
        buffer = ShuffleBuffer(10, seed=1, on_host=on_host)
        assert buffer._empty(4, torch.empty(1, 3, device="meta")).device.type == kept


def test_a_buffer_grows_until_the_next_draw() -> None:
    buffer = _buffer(4, seed=1)
    for first in (0, 3, 6, 9):
        buffer.add(_rows(first, 3))
    assert (len(buffer), buffer.capacity) == (12, 4)
    assert buffer.rows[:, 0].int().tolist() == list(range(12))


def test_sizes_are_bytes_or_rows_or_what_there_is_room_for() -> None:
    assert Feed(buffer="1K").buffer_rows(16, 0) == 64
    assert Feed(buffer="1K").buffer_rows(4096, 0) == 1
    assert Feed(buffer="300rows").buffer_rows(4096, 0) == 300
    assert Feed().buffer_rows(8192, 2**40) == 250_000
    assert Feed().buffer_rows(8192, 2**20) == 128
    for text in ("rows", "1.5rows", "-3rows", "1X", "3 rows", "much"):
        with pytest.raises(UsageError, match="--buffer"):
            Feed(buffer=text)
    assert share_of_memory() > 2**20
