"""The ratio test, duplicates, cosines, and the bootstrap against what is known."""

import math

import pytest
import torch
from torch import Tensor

from dlmctl.memorization.images.nearest_ratio import (
    Bootstrap,
    distinct,
    memorized,
    ratios,
    shared,
    similarities,
)
from dlmctl.memorization.images.neighbours import nearest
from dlmctl.records.errors import DataError


def normal(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def share(samples: Tensor, references: Tensor, threshold: float = 1 / 3) -> float:
    return float(memorized(nearest(samples, references), threshold).double().mean())


def test_copies_are_memorized_and_fresh_draws_are_not():
    train = normal(400, 20, 0)
    assert share(train, train) == 1
    assert share(train + 1e-3 * normal(400, 20, 1), train) == 1
    assert share(normal(400, 20, 2), train) < 0.01


def test_copies_of_what_is_there_twice_show_only_without_the_duplicates():
    train = normal(100, 20, 3)
    twice = torch.cat([train, train])
    assert share(train, twice) == 0
    assert ratios(nearest(train, twice)).tolist() == [1.0] * 100
    assert share(train, twice[distinct(twice)]) == 1


def test_the_ratio_is_that_of_the_distances():
    references = torch.tensor([[0.0], [1.0], [9.0]])
    near = nearest(torch.tensor([[0.25], [0.2], [5.0]]), references)
    torch.testing.assert_close(ratios(near), torch.tensor([1 / 3, 0.25, 1.0]).double())
    assert memorized(near, 0.3).tolist() == [False, True, False]


def test_the_perfect_memorizer_is_found_out():
    """The optimal denoiser of a finite set (arXiv 2310.02664) gives the set back."""
    train = normal(50, 30, 4).double()
    sigma = 0.3
    noisy = train.repeat(4, 1) + sigma * normal(200, 30, 5)
    weights = (-torch.cdist(noisy, train).square() / (2 * sigma**2)).softmax(1)
    assert share(weights @ train, train) > 0.99


def test_duplicates_go_and_the_first_stays():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, -0.0], [2.05, 0.0], [2.0, 0.0], [2.12, 0.0]])
    assert distinct(rows).tolist() == [0, 1, 3, 5]
    # 2.12 is within 0.1 of 2.05, which is itself left out, but not of 2.
    assert distinct(rows, 0.1).tolist() == [0, 1, 5]
    assert distinct(rows, 0.2).tolist() == [0, 1]


def test_duplicates_within_a_tolerance_are_those_of_a_plain_loop():
    rows = torch.rand(1300, 2, generator=torch.Generator().manual_seed(6))
    kept: list[int] = []
    for number, row in enumerate(rows.double()):
        if not bool(((rows[kept].double() - row).norm(dim=1) <= 0.02).any()):
            kept.append(number)
    assert 600 < len(kept) < 1200
    assert distinct(rows, 0.02).tolist() == kept


def test_shared_counts_what_is_in_both():
    train = normal(5, 3, 7)
    assert shared(train, torch.cat([train[3:], train[:1], train[:1], normal(4, 3, 8)])) == 4


def test_cosines_are_the_largest():
    x, y = normal(30, 8, 9), normal(50, 8, 10) * torch.linspace(0.1, 9, 50)[:, None]
    cosines = torch.nn.functional.cosine_similarity(x[:, None].double(), y[None].double(), dim=2)
    torch.testing.assert_close(similarities(x, y), cosines.amax(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(similarities(y * 2, y), torch.ones(50).double(), rtol=0, atol=1e-6)
    with pytest.raises(DataError, match="have no cosine"):
        similarities(x, torch.zeros(2, 8))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_of_a_share_is_about_that_of_a_normal(confidence):
    count, hits = 2000, 600
    values = (torch.arange(count) < hits).double()
    low, high = Bootstrap(4000, confidence).interval(values)
    z = math.sqrt(2) * float(torch.erfinv(torch.tensor(confidence)))
    half = z * math.sqrt(0.3 * 0.7 / count)
    assert low == pytest.approx(0.3 - half, abs=0.1 * half)
    assert high == pytest.approx(0.3 + half, abs=0.1 * half)


def test_intervals_cover_as_often_as_they_say():
    generator = torch.Generator().manual_seed(11)
    covered = 0
    for _ in range(300):
        low, high = Bootstrap(300, 0.9).interval(torch.randn(60, generator=generator) + 5)
        covered += low <= 5 <= high
    # Standard error 0.017; that of the percentile interval is a little too narrow.
    assert 0.84 < covered / 300 < 0.95


def test_the_interval_of_a_quantile_is_about_that_of_order_statistics():
    values = torch.arange(1000).double()
    low, high = Bootstrap(2000).percentile(values, 0.95)
    half = 1.96 * math.sqrt(1000 * 0.95 * 0.05)
    assert low == pytest.approx(949 - half, abs=3)
    assert high == pytest.approx(949 + half, abs=3)


def test_one_seed_resamples_samples_together(monkeypatch):
    x = normal(50, 1, 12)[:, 0]
    boot = Bootstrap(200)
    both = boot._means(x) - boot._means(3 * x)
    torch.testing.assert_close(both, boot._means(-2 * x))
    assert boot.interval(x) == boot.interval(x)
    assert boot.interval(x) != Bootstrap(200, seed=1).interval(x)
    # Nor do the parts matter that resamples are drawn in.
    whole = boot.interval(x)
    monkeypatch.setattr("dlmctl.memorization.images.nearest_ratio._PART", 50 * 7)
    assert boot.interval(x) == whole
    assert Bootstrap().interval(torch.ones(9)) == (1.0, 1.0)
