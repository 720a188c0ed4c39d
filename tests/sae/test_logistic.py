"""Logistic regression, compared with scikit-learn's."""

import pytest
import torch

from dlmctl.sae.evaluation.logistic import equal_weights, fit_probe

sklearn = pytest.importorskip("sklearn.linear_model")


def cloud(rows=150, columns=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.0, 30.0, 0.01, 1.0, 2.0, 5.0]) + 7
    chance = torch.sigmoid(x[:, 0] - 8 + 0.05 * x[:, 1])
    return x, torch.rand(rows, generator=generator) < chance


@pytest.mark.parametrize("strata", [None, 3])
def test_it_is_that_of_scikit_learn_on_standardized_columns(strata):
    x, present = cloud()
    stratum = None if strata is None else torch.arange(len(x)) % strata
    weights = equal_weights(present.long() if stratum is None else stratum) * len(x)
    columns = (x - x.mean(dim=0)) / x.std(dim=0, unbiased=False)
    other = sklearn.LogisticRegression(tol=1e-10, max_iter=1000)
    other.fit(columns.numpy(), present.numpy(), sample_weight=weights.numpy())
    expected = torch.tensor(other.decision_function(columns.numpy()))
    torch.testing.assert_close(
        fit_probe(x, present, stratum).scores(x), expected, atol=1e-5, rtol=0
    )


def test_units_and_constant_columns_change_nothing():
    x, present = cloud()
    scores = fit_probe(x, present).scores(x)
    other = torch.cat([x * 1e-4, torch.full((len(x), 1), 0.1)], dim=1)
    probe = fit_probe(other, present)
    assert float(probe.weight[-1]) == 0.0
    torch.testing.assert_close(probe.scores(other), scores, atol=1e-5, rtol=0)


def test_labels_that_are_separable_have_a_finite_probe():
    x = torch.tensor([[-2.0], [-1.0], [1.0], [3.0]])
    probe = fit_probe(x, x[:, 0] > 0)
    assert (probe.scores(x) > 0).tolist() == [False, False, True, True]
    assert 0 < float(probe.weight) < 10


def test_strata_weigh_the_same():
    weights = equal_weights(torch.tensor([5, 5, 5, 1]))
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
