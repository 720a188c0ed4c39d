"""The ratio test, duplicates and cosines against what is known."""

import pytest
import torch
from torch import Tensor

from dlmctl.memorization.images.nearest_ratio import (
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
