"""Nearest neighbours against brute force in float64, near copies and odd blocks included."""

import pytest
import torch
from torch import Tensor

from dlmctl.memorization.images import neighbours
from dlmctl.memorization.images.neighbours import nearest
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


TF32, BF16 = 11, 8
"""Bits of a number, with the first."""


def rounded(values: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)


def coarse_addmm(bits: int, only_if_allowed: bool = False):
    """`torch.addmm` with operands rounded to so many bits if they are float32, as tensor cores do;
    the sum is exact."""
    plain = torch.addmm

    def addmm(start: Tensor, x: Tensor, y: Tensor, **options) -> Tensor:
        allowed = torch.get_float32_matmul_precision() != "highest"
        if x.dtype == torch.float32 and (allowed or not only_if_allowed):
            x, y = rounded(x, bits), rounded(y, bits)
            return plain(start.double(), x.double(), y.double(), **options).float()
        return plain(start, x, y, **options)

    return addmm


def near_copies() -> tuple[Tensor, Tensor]:
    """Groups of references so near to each other that their distances are lost in rounding."""
    base = 10 * normal(40, 768, 13)
    y = base.repeat_interleave(10, 0) + 0.02 * normal(400, 768, 14)
    return base.repeat(2, 1) + 0.02 * normal(80, 768, 15), y


@pytest.mark.parametrize("bits", [TF32, BF16])
@pytest.mark.parametrize("memory", [2**20, 2**29])
def test_neighbours_are_exact_whatever_the_precision_of_a_product(monkeypatch, bits, memory):
    """Also where it is lower than it is said to be."""
    x, y = near_copies()
    wanted = brute(x, y, 2)
    monkeypatch.setattr(torch, "addmm", coarse_addmm(bits))
    found = nearest(x, y, 2, memory)
    assert torch.equal(found.indices, wanted[1])
    torch.testing.assert_close(found.distances, wanted[0], rtol=1e-6, atol=0)
    error = neighbours.product_error(torch.device("cpu"), torch.float32)
    assert error == pytest.approx(2 * 2.0**-bits, rel=0.2)  # half an ulp of each operand
    # Without that error in the bound some would be wrong.
    monkeypatch.setattr(neighbours, "product_error", lambda *_: 0.0)
    assert not torch.equal(nearest(x, y, 2, memory).indices, wanted[1])


def test_products_of_few_bits_are_switched_off_for_the_search(monkeypatch):
    """So that none of the rows are searched again; afterwards all is as it was."""
    x, y = normal(50, 64, 16), normal(300, 64, 17)
    dtypes, run = [], neighbours._Search.run

    def watched(search, part, rows, dtype):
        dtypes.append((dtype, torch.get_float32_matmul_precision()))
        return run(search, part, rows, dtype)

    monkeypatch.setattr(neighbours._Search, "run", watched)
    monkeypatch.setattr(torch, "addmm", coarse_addmm(TF32, only_if_allowed=True))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        found = nearest(x, y)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.indices, brute(x, y, 2)[1])
    assert dtypes == [(torch.float32, "highest")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_err_by_half_an_ulp(dtype):
    error = neighbours.product_error(torch.device("cpu"), dtype)
    assert error <= torch.finfo(dtype).eps / 2


@pytest.mark.parametrize(("width", "offset"), [(32, 0.0), (192, 1.0)])
def test_faiss_has_the_same_neighbours(width, offset):
    """IndexFlatL2, exact but for rounding to float32."""
    faiss = pytest.importorskip("faiss")
    y, x = normal(900, width, 31) + offset, normal(200, width, 32) + offset
    x[:50] = y[:50] + 0.01 * x[:50]  # copies
    index = faiss.IndexFlatL2(width)
    index.add(y.numpy())
    squares, places = index.search(x.numpy(), 2)
    found = nearest(x, y, 2)
    assert torch.equal(found.indices, torch.from_numpy(places))
    wanted = torch.from_numpy(squares).double()
    torch.testing.assert_close(found.distances.square(), wanted, rtol=1e-4, atol=1e-4)
