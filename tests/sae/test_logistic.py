"""Logistic regression against scikit-learn, closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from dlmctl.sae.logistic import (
    Design,
    Logistic,
    best_penalty,
    equal_weights,
    fit,
    fit_probe,
    losses,
)
from dlmctl.sae.topk import Codes

N, D, F, K = 400, 3, 30, 4


def _problem(seed: int = 0) -> tuple[Design, torch.Tensor, torch.Tensor]:
    """A design, the same without sparseness [N, D + F], and labels that depend on it."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(N, D, generator=generator, dtype=torch.float64)
    columns = torch.rand(N, F, generator=generator).topk(K, dim=1).indices
    values = torch.rand(N, K, generator=generator, dtype=torch.float64)
    design = Design(dense, values, columns, F)
    whole = torch.cat([dense, Codes(values, columns).dense(F)], dim=1)
    truth = torch.randn(D + F, generator=generator, dtype=torch.float64)
    odds = whole @ truth - 0.5
    return design, whole, torch.rand(N, generator=generator) < odds.sigmoid()


def _penalties(value: float, width: int = D + F) -> torch.Tensor:
    return torch.full((width,), value, dtype=torch.float64)


def test_sparse_columns_are_the_matrix_that_they_stand_for() -> None:
    design, whole, _ = _problem()
    weights, errors = torch.randn(D + F).double(), torch.randn(N).double()
    torch.testing.assert_close(design.times(weights), whole @ weights)
    torch.testing.assert_close(design.transposed_times(errors), whole.T @ errors)
    part = design.rows(torch.arange(N) % 3 == 0)
    torch.testing.assert_close(part.times(weights), (whole @ weights)[::3])
    assert design.width == D + F
    assert Design.of(whole).times(weights) == pytest.approx(whole @ weights)


def test_the_fit_is_that_of_scikit_learn() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    design, whole, labels = _problem()
    for penalty in (1e-1, 1e-3):
        other = linear_model.LogisticRegression(C=1 / (penalty * N), tol=1e-10, max_iter=10_000)
        other.fit(whole.numpy(), labels.numpy())
        ours = fit(design, labels, _penalties(penalty))
        assert ours.weights.tolist() == pytest.approx(other.coef_[0].tolist(), abs=1e-4)
        assert float(ours.intercept) == pytest.approx(other.intercept_[0], abs=1e-4)
        scores = other.decision_function(whole.numpy())
        assert ours.scores(design).tolist() == pytest.approx(scores.tolist(), abs=1e-3)


def test_no_column_leaves_the_log_odds_of_the_mean() -> None:
    labels = torch.arange(40) < 10
    fitted = fit(Design.of(torch.zeros(40, 2)), labels, _penalties(1.0, 2))
    assert float(fitted.intercept) == pytest.approx(math.log(10 / 30), abs=1e-6)
    assert fitted.weights.tolist() == [0, 0]


def test_each_column_has_its_own_penalty_and_the_slope_is_zero_at_the_minimum() -> None:
    design, whole, labels = _problem()
    penalties = torch.logspace(-3, 0, D + F, dtype=torch.float64)
    fitted = fit(design, labels, penalties)
    weights = fitted.weights.clone().requires_grad_(True)
    intercept = fitted.intercept.clone().requires_grad_(True)
    scores = whole @ weights + intercept
    signs = torch.where(labels, 1.0, -1.0)
    loss = (-torch.nn.functional.logsigmoid(signs * scores)).mean()
    (loss + (penalties * weights**2).sum() / 2).backward()
    assert weights.grad is not None
    assert intercept.grad is not None
    assert float(weights.grad.abs().max()) < 1e-6
    assert float(intercept.grad.abs()) < 1e-6
    assert losses(scores.detach(), labels).mean() == pytest.approx(loss.item())


def test_where_it_begins_does_not_matter() -> None:
    design, _, labels = _problem()
    far = Logistic(torch.ones(D + F, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64))
    found = [fit(design, labels, _penalties(1e-2), start).weights for start in (None, far)]
    assert found[0].tolist() == pytest.approx(found[1].tolist(), abs=1e-5)


def test_the_penalty_is_the_one_whose_loss_on_rows_held_out_is_least() -> None:
    design, whole, labels = _problem()
    folds = torch.arange(N) % 3
    grid = [_penalties(10.0**-power) for power in range(4)]
    best, means = best_penalty(design, labels, folds, grid)
    for penalties, mean in zip(grid, means, strict=True):
        total = 0.0
        for fold in range(3):
            kept = folds != fold
            fitted = fit(Design.of(whole[kept]), labels[kept], penalties)
            held = losses(fitted.scores(Design.of(whole[~kept])), labels[~kept])
            total += float(held.sum())
        assert mean == pytest.approx(total / N, abs=1e-5)
    assert best == min(range(4), key=means.__getitem__)
    assert best_penalty(design, labels.roll(7), folds, grid)[0] == 0  # nothing to learn
    assert best > 0


def cloud(rows: int = 150, columns: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = x * torch.tensor([1.0, 30.0, 0.01, 1.0, 2.0, 5.0]) + 7
    chance = torch.sigmoid(x[:, 0] - 8 + 0.05 * x[:, 1])
    return x, torch.rand(rows, generator=generator) < chance


@pytest.mark.parametrize("strata", [None, 3])
def test_it_is_that_of_scikit_learn_on_standardized_columns(strata: int | None) -> None:
    x, present = cloud()
    stratum = None if strata is None else torch.arange(len(x)) % strata
    weights = equal_weights(present.long() if stratum is None else stratum) * len(x)
    columns = (x - x.mean(dim=0)) / x.std(dim=0, unbiased=False)
    other = pytest.importorskip("sklearn.linear_model").LogisticRegression(tol=1e-10, max_iter=1000)
    other.fit(columns.numpy(), present.numpy(), sample_weight=weights.numpy())
    expected = torch.tensor(other.decision_function(columns.numpy()))
    torch.testing.assert_close(
        fit_probe(x, present, stratum).scores(x), expected, atol=1e-5, rtol=0
    )


def test_units_and_constant_columns_change_nothing() -> None:
    x, present = cloud()
    scores = fit_probe(x, present).scores(x)
    other = torch.cat([x * 1e-4, torch.full((len(x), 1), 0.1)], dim=1)
    probe = fit_probe(other, present)
    assert float(probe.weight[-1]) == 0.0
    torch.testing.assert_close(probe.scores(other), scores, atol=1e-5, rtol=0)


def test_labels_that_are_separable_have_a_finite_probe() -> None:
    x = torch.tensor([[-2.0], [-1.0], [1.0], [3.0]])
    probe = fit_probe(x, x[:, 0] > 0)
    assert (probe.scores(x) > 0).tolist() == [False, False, True, True]
    assert 0 < float(probe.weight) < 10


def test_strata_weigh_the_same() -> None:
    weights = equal_weights(torch.tensor([5, 5, 5, 1]))
    assert weights.tolist() == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
