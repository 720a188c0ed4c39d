"""EDM against Gaussian data, where denoiser, loss and solution are known, and the memorizer."""

import itertools
import math

import pytest
import torch
from torch import nn

from dlmctl.distill.edm import (
    EdmDenoiser,
    OptimalDenoiser,
    edm_loss,
    noise_grid,
    ode_step,
    solve,
)
from dlmctl.distill.image_sets import read_images
from dlmctl.settings.images import NoiseLaw, NoiseRange

SD = 0.7


class Affine(nn.Module):
    """F(x, c) = weight x + bias c, of which the denoiser is known in closed form."""

    def __init__(self, weight: float, bias: float) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x, c):
        return self.weight * x + self.bias * c.view(-1, *[1] * (x.dim() - 1))


def gaussian_denoiser(x, sigma):
    """E[y | x] of y ~ N(0, SD^2)."""
    return x * (SD**2 / (SD**2 + sigma**2)).to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def exact_solution(x, sigma, to):
    return x * math.sqrt((SD**2 + to**2) / (SD**2 + sigma**2))


def test_the_grid_has_the_ends_and_the_bend_of_the_paper():
    noise = NoiseRange()
    for points in (2, 18, 40):
        grid = noise_grid(noise, points)
        assert (grid[0].item(), grid[-1].item()) == (80.0, 0.002)
        assert bool((grid[1:] < grid[:-1]).all())
    middle = ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    assert noise_grid(noise, 3)[1].item() == pytest.approx(middle, rel=1e-12)
    assert noise_grid(noise, 1).tolist() == [80.0]
    straight = noise_grid(NoiseRange(1.0, 5.0, 1.0), 5)
    torch.testing.assert_close(straight, torch.arange(5.0, 0, -1, dtype=torch.float64))


def test_the_denoiser_is_the_preconditioned_network():
    x, sigma = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0.01, 0.5, 2.0, 70.0])
    made = EdmDenoiser(Affine(0.3, 0.2), SD)(x, sigma.double())
    for row, s, found in zip(x, sigma.double().tolist(), made, strict=True):
        network = 0.3 * row / math.sqrt(s**2 + SD**2) + 0.2 * math.log(s) / 4
        expected = SD**2 / (s**2 + SD**2) * row + s * SD / math.sqrt(s**2 + SD**2) * network
        torch.testing.assert_close(found, expected)


def test_the_loss_of_the_exact_denoiser_is_one_at_every_level():
    """The posterior variance is SD^2 sigma^2 / (SD^2 + sigma^2), the weight its inverse."""
    data = SD * torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    for mean in (-4.0, -1.2, 1.0, 4.0):
        random = torch.Generator().manual_seed(1)
        loss = edm_loss(EdmDenoiser(Affine(0, 0), SD), data, NoiseLaw(mean, 0.5), random)
        assert loss.item() == pytest.approx(1.0, abs=0.02)


def test_the_loss_is_the_networks_error_at_unit_weight():
    """lambda c_out^2 = 1: a network that is off by a constant e loses e^2 more, or b c_noise."""
    data = SD * torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    law = NoiseLaw(2.0, 0.0)
    random = torch.Generator().manual_seed(1)
    loss = edm_loss(EdmDenoiser(Affine(0, 3.0), SD), data, law, random)
    assert loss.item() == pytest.approx(1 + (3.0 * 2.0 / 4) ** 2, abs=0.05)


def test_levels_of_training_are_log_normal():
    seen = []

    class Recorder(nn.Module):
        def forward(self, x, c):
            seen.append(4 * c.double())
            return torch.zeros_like(x)

    data, random = torch.zeros(20_000, 1), torch.Generator().manual_seed(0)
    edm_loss(EdmDenoiser(Recorder(), SD), data, NoiseLaw(-1.2, 1.2), random)
    assert seen[0].mean().item() == pytest.approx(-1.2, abs=0.04)
    assert seen[0].std().item() == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("euler", 1)])
def test_the_order_of_the_samplers(solver, order):
    x = torch.tensor([[1.3], [-0.4]], dtype=torch.float64)
    errors = []
    for steps in (16, 32, 64):
        sigmas = torch.linspace(3.0, 0.5, steps + 1, dtype=torch.float64)
        found = solve(gaussian_denoiser, x, sigmas, solver, to_zero=False)
        errors.append((found - exact_solution(x, 3.0, 0.5)).abs().max().item())
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_samples_of_gaussian_data_have_its_variance():
    z = 80 * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)).double()
    made = solve(gaussian_denoiser, z, noise_grid(NoiseRange(), 40))
    # Where the ODE begins, at sigma_max, the spread is that of noise and data together.
    assert made.std().item() == pytest.approx(SD * 80 / math.hypot(80, SD), rel=0.015)
    torch.testing.assert_close(made, exact_solution(z, 80.0, 0.0), rtol=0.01, atol=0)


def test_a_sampler_evaluates_the_denoiser_as_often_as_it_says():
    calls = []

    def counting(x, sigma):
        calls.append(sigma[0].item())
        return gaussian_denoiser(x, sigma)

    for solver, count in (("heun", 35), ("euler", 18)):
        calls.clear()
        solve(counting, torch.ones(2, 1), noise_grid(NoiseRange(), 18), solver)
        assert len(calls) == count
        assert min(calls) == 0.002


def test_the_optimal_denoiser_is_the_posterior_mean():
    random = torch.Generator().manual_seed(0)
    data = torch.randn(7, 1, 2, 3, generator=random)
    x = torch.randn(5, 1, 2, 3, generator=random)
    sigma = torch.tensor([0.002, 0.3, 1.0, 5.0, 80.0], dtype=torch.float64)
    found = OptimalDenoiser(data)(x, sigma)
    for row, s, made in zip(x, sigma.tolist(), found, strict=True):
        logs = [-(row - y).double().square().sum().item() / (2 * s**2) for y in data]
        weights = [math.exp(log - max(logs)) for log in logs]
        mean = sum(w * y.double() for w, y in zip(weights, data, strict=True)) / sum(weights)
        torch.testing.assert_close(made.double(), mean, rtol=1e-5, atol=1e-6)


def test_the_optimal_denoiser_minimises_the_loss():
    """No network does better: the loss of the exact one falls short of a shrunk or grown one's."""
    data = read_images("builtin:digits#0:40")
    exact = OptimalDenoiser(data)

    def loss(scale):
        random = torch.Generator().manual_seed(0)
        exact.sigma_data = 0.5
        scaled = lambda x, sigma: scale * exact(x, sigma)  # noqa: E731
        scaled.sigma_data = 0.5
        return edm_loss(scaled, data.repeat(20, 1, 1, 1), NoiseLaw(0.0, 1.0), random).item()

    assert loss(1.0) < min(loss(0.97), loss(1.03))


def test_samples_of_the_optimal_denoiser_are_images_of_its_set():
    data = read_images("builtin:digits#0:64")
    z = 80 * torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    made = solve(OptimalDenoiser(data), z, noise_grid(NoiseRange(), 18))
    near = torch.cdist(made.flatten(1), data.flatten(1)).topk(2, 1, largest=False)
    assert near.values[:, 0].max() < 1e-2
    assert (near.values[:, 0] / near.values[:, 1]).max() < 1 / 3
    # Not always the same one.
    assert near.indices[:, 0].unique().numel() > 20


def test_a_step_to_zero_is_the_denoised_point():
    x, sigma = torch.tensor([[2.0]]), torch.tensor([0.5], dtype=torch.float64)
    made = ode_step(gaussian_denoiser, x, sigma, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(made, gaussian_denoiser(x, sigma))
