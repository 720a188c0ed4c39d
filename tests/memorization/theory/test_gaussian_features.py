"""Moments of tanh features: against two-dimensional quadrature, derivatives and draws."""

import numpy as np
import pytest
import torch

from dlmctl.memorization.theory.gaussian_features import feature_moments, normal_rule


def pair(mean: torch.Tensor, loadings: torch.Tensor) -> float:
    """E[tanh(h_1) tanh(h_2)] by a product rule on the Cholesky factor of the covariance."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(100)
    weights = weights / weights.sum()
    (a, b), (c, d) = (loadings @ loadings.T).tolist()
    assert b == pytest.approx(c)
    first = mean[0].item() + a**0.5 * nodes[:, None]
    second = mean[1].item() + b / a**0.5 * nodes[:, None] + (d - b * b / a) ** 0.5 * nodes
    return float(weights @ (np.tanh(first) * np.tanh(second)) @ weights)


@pytest.mark.parametrize("scale", [0.1, 0.4, 1.0])
def test_products_are_those_of_quadrature(scale):
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    loadings = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    loadings *= scale / loadings.norm(dim=1, keepdim=True)
    second = feature_moments(mean, loadings).second
    for i, j in [(0, 1), (1, 3), (2, 4), (3, 4)]:
        both = [i, j]
        wanted = np.mean([pair(mean[both, n], loadings[both]) for n in range(4)])
        assert second[i, j].item() == pytest.approx(wanted, abs=1e-10)
        assert second[j, i].item() == pytest.approx(second[i, j].item(), abs=1e-14)


def test_the_diagonal_is_the_whole_variance_even_of_nearly_equal_features():
    mean = torch.tensor([[0.3], [0.3], [-0.2]], dtype=torch.float64)
    loadings = torch.tensor([[1.0, 0.0], [1.0, 0.01], [-1.0, 0.3]], dtype=torch.float64)
    second = feature_moments(mean, loadings).second
    nodes, weights = normal_rule(1.0)
    wanted = float(torch.tanh(0.3 + nodes) ** 2 @ weights)
    assert second[0, 0].item() == pytest.approx(wanted, abs=1e-11)
    assert second[0, 1].item() == pytest.approx(
        pair(mean[:2, 0], loadings[:2] + torch.tensor([[0, 0], [0, 1e-9]])), abs=1e-9
    )
    assert torch.linalg.eigvalsh(second).min() > 0


def test_the_slope_is_the_derivative_of_the_level_by_the_mean():
    mean = torch.linspace(-2, 2, 12, dtype=torch.float64).reshape(3, 4)
    loadings = torch.tensor([[0.2, 0.1], [0.5, -0.4], [0.0, 1.0]], dtype=torch.float64)
    above, below = (feature_moments(mean + h, loadings).level for h in (1e-5, -1e-5))
    slope = feature_moments(mean, loadings).slope
    torch.testing.assert_close(slope, (above - below) / 2e-5, rtol=0, atol=1e-9)


def test_batches_of_samples_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(6, 9, generator=generator, dtype=torch.float64)
    loadings = 0.3 * torch.randn(6, 3, generator=generator, dtype=torch.float64)
    whole = feature_moments(mean, loadings)
    monkeypatch.setattr("dlmctl.memorization.theory.gaussian_features.BATCH_BYTES", 1)
    for one, other in zip(whole, feature_moments(mean, loadings), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_the_rule_integrates_polynomials_and_tanh():
    nodes, weights = normal_rule(1.5)
    for power, wanted in ((0, 1), (1, 0), (2, 1), (4, 3), (6, 15)):
        assert float(nodes**power @ weights) == pytest.approx(wanted, abs=1e-9)
    fine = np.linspace(-12, 12, 200_001)
    fine_weights = np.exp(-(fine**2) / 2)
    wanted = (np.tanh(1.5 * fine) ** 2 * fine_weights).sum() / fine_weights.sum()
    assert float(torch.tanh(1.5 * nodes) ** 2 @ weights) == pytest.approx(wanted, abs=1e-11)
