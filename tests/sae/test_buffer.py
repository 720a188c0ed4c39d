"""The shuffle buffer gives every row once, in an order that the seed decides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dlmctl.sae.training.buffer import ShuffleBuffer


def _rows(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count, dtype=torch.float32)[:, None].expand(-1, 3).clone()


def _buffer(rows: int, seed: int) -> ShuffleBuffer:
    return ShuffleBuffer(rows * 3 * 4, seed)


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_room_is_bytes_whatever_the_dtype(dtype: torch.dtype) -> None:
    size, rows = torch.empty(0, dtype=dtype).element_size(), torch.zeros(3, 8, dtype=dtype)
    buffer = ShuffleBuffer(100 * 8 * size, seed=1)
    buffer.add(rows)
    assert buffer.capacity == 100
    for bounds, wanted in (((200, 300), 200), ((1, 50), 50), ((200, 50), 50)):
        buffer = ShuffleBuffer(100 * 8 * size, 1, *bounds)
        buffer.add(rows)
        assert buffer.capacity == wanted
    half = ShuffleBuffer(100 * 8 * 4, seed=1)  # room for 100 rows of float32
    half.add(rows)
    assert half.capacity == 400 // size
