"""KID against plain loops, its mean over draws, and torch-fidelity."""

import pytest
import torch

from dlmctl.memorization.images.kernel_distance import cubic_discrepancy, kernel_distance


def normal(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def test_the_discrepancy_is_that_of_plain_loops():
    x, y = normal(5, 3, 0), normal(5, 3, 1) + 1

    def kernel(a, b):
        return (float(a @ b) / 3 + 1) ** 3

    wanted = -2 * sum(kernel(a, b) for a in x for b in y) / 25
    for each in (x, y):
        pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
        wanted += sum(kernel(each[i], each[j]) for i, j in pairs) / 20
    assert cubic_discrepancy(x, y) == pytest.approx(wanted, rel=1e-12)


def test_two_sets_of_one_law_have_none_on_average():
    draws = [cubic_discrepancy(normal(20, 4, 2 * n), normal(20, 4, 2 * n + 1)) for n in range(400)]
    values = torch.tensor(draws)
    assert abs(float(values.mean())) < 3 * float(values.std()) / 20
    assert float((values < 0).double().mean()) > 0.3


def test_subsets_are_drawn_by_seed_and_cut_to_the_sets():
    x, y = normal(30, 4, 0), normal(50, 4, 1) + 0.5
    one = kernel_distance(x, y, 8, 20, seed=3)
    assert one == kernel_distance(x, y, 8, 20, seed=3)
    assert one != kernel_distance(x, y, 8, 20, seed=4)
    assert one.std > 0
    # The whole of both sets is one subset, in any order.
    whole = kernel_distance(x, y[:30], 5, 1000, seed=0)
    assert whole.mean == pytest.approx(cubic_discrepancy(x, y[:30]), rel=1e-12)
    assert whole.std == pytest.approx(0, abs=1e-12)


def test_torch_fidelity_draws_the_same_subsets():
    pytest.importorskip("torchvision")
    metric = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(60, 16, 0), normal(80, 16, 1) * 1.2 + 0.3
    settings = {"kid_subsets": 12, "kid_subset_size": 40, "rng_seed": 11, "verbose": False}
    wanted = metric.kid_features_to_metric(x, y, **settings)
    found = kernel_distance(x, y, 12, 40, seed=11)
    assert found.mean == pytest.approx(wanted["kernel_inception_distance_mean"], rel=1e-9)
    assert found.std == pytest.approx(wanted["kernel_inception_distance_std"], rel=1e-9)
