"""Nearest neighbours against brute force in float64, near copies and odd blocks included."""

import pytest
import torch
from torch import Tensor

from dlmctl.consistency import neighbours
from dlmctl.consistency.neighbours import nearest
from dlmctl.records.errors import DataError

SMALL = 2**16
"""Bytes of blocks that divide nothing."""


def brute(x: Tensor, y: Tensor, k: int, own: bool = False) -> tuple[Tensor, Tensor]:
    far = (x.double()[:, None] - y.double()[None]).square().sum(2).sqrt()
    if own:
        far.fill_diagonal_(torch.inf)
    order = far.argsort(dim=1, stable=True)[:, :k]
    return far.gather(1, order), order


def normal(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("memory", [SMALL, 2**19, 2**29])
@pytest.mark.parametrize(("count", "width", "k"), [(97, 5, 1), (97, 64, 2), (300, 17, 7)])
def test_brute_force_is_met(memory, count, width, k):
    x, y = normal(61, width, 1), normal(count, width, 2) + 3
    found, wanted = nearest(x, y, k, memory), brute(x, y, k)
    torch.testing.assert_close(found.distances, wanted[0], rtol=1e-6, atol=0)
    assert torch.equal(found.indices, wanted[1])


@pytest.mark.parametrize("memory", [SMALL, 2**29])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_near_copies_keep_their_tiny_distance(memory, offset):
    y = normal(500, 40, 3).double() + offset
    step = torch.nn.functional.normalize(normal(500, 40, 4).double(), dim=1)
    found = nearest(y + 1e-6 * step, y, 2, memory)
    torch.testing.assert_close(
        found.distances[:, 0], torch.full((500,), 1e-6).double(), rtol=1e-6, atol=1e-12
    )
    assert torch.equal(found.indices[:, 0], torch.arange(500))
    torch.testing.assert_close(found.distances, brute(y + 1e-6 * step, y, 2)[0], rtol=1e-7, atol=0)


def test_a_crowd_of_near_copies_is_told_apart(monkeypatch):
    """More references within rounding of each other than there are spare candidates."""
    base = normal(1, 64, 5).double() * 10
    away = torch.linspace(1e-3, 1e-6, 200).double()[:, None] * normal(1, 64, 6).double()
    y = torch.cat([base + away, normal(300, 64, 7).double() * 10])
    x = base.repeat(3, 1)
    found, wanted = nearest(x, y, 2, SMALL), brute(x, y, 2)
    assert torch.equal(found.indices, wanted[1])
    assert found.indices[0].tolist() == [199, 198]
    torch.testing.assert_close(found.distances, wanted[0])
    # Without the second search it would not be.
    monkeypatch.setattr(neighbours, "_FACTOR", -1e9)
    assert nearest(x, y, 2, SMALL).indices[0].tolist() != [199, 198]


def test_none_is_its_own_neighbour():
    y = normal(150, 6, 8)
    for memory in (SMALL, 2**29):
        found, wanted = nearest(y, y, 3, memory, own=True), brute(y, y, 3, own=True)
        assert torch.equal(found.indices, wanted[1])
    assert (nearest(y[:4], y[:4], 3, own=True).indices != torch.arange(4)[:, None]).all()


def test_of_equal_references_the_first_comes_first():
    y = normal(3, 4, 9).repeat(2, 1)
    assert nearest(y[:3], y, 2).indices.tolist() == [[0, 3], [1, 4], [2, 5]]


def test_order_and_batching_do_not_matter():
    x, y = normal(40, 30, 10), normal(211, 30, 11)
    shuffle = torch.randperm(211, generator=torch.Generator().manual_seed(0))
    whole, parts = nearest(x, y), [nearest(part, y[shuffle], 2, SMALL) for part in x.split(7)]
    assert torch.equal(whole.distances, torch.cat([part.distances for part in parts]))
    assert torch.equal(whole.indices, torch.cat([shuffle[part.indices] for part in parts]))


def test_least_finds_what_topk_finds():
    scores = normal(20, 1001, 12)
    least, places = neighbours._least(scores, 6)
    assert torch.equal(least, scores.topk(6, largest=False).values)
    assert torch.equal(scores.gather(1, places), least)


def test_too_few_references_and_two_widths_are_refused():
    with pytest.raises(DataError, match="3 references are needed, and there are 2"):
        nearest(normal(2, 3, 0), normal(2, 3, 0), 2, own=True)
    with pytest.raises(DataError, match="of 3 and of 4 numbers"):
        nearest(normal(2, 3, 0), normal(2, 4, 0))
