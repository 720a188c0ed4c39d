"""Continuous time: the derivative by finite differences, and Gaussians, whose map is known."""

import pytest
import torch
from torch import nn

from dlmctl.distill.consistency_model import ConsistencyModel
from dlmctl.distill.edm import OptimalDenoiser
from dlmctl.distill.image_networks import NetworkConfig, make_network
from dlmctl.distill.trigflow import LAW, angle, tangent, teacher_slope, trigflow_loss
from dlmctl.settings.images import NoiseRange

SD, SPREAD = 0.5, 0.8
"""sigma_data, and the standard deviation that the data really have."""
NETWORKS = [
    NetworkConfig("mlp", (3,), 16, (), 1),
    NetworkConfig("unet", (1, 8, 8), 16, (1, 2), 1, (1,)),
]


def student(config):
    torch.manual_seed(0)
    network = make_network(config).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.3)
    return ConsistencyModel(network, SD, 0.0)


def levels(*sigmas):
    return torch.tensor(sigmas, dtype=torch.float64)


def at(model, x, t):
    """f(x_t, t), through the model in EDM's terms."""
    shape = (-1, *[1] * (x.dim() - 1))
    return model(x / t.cos().view(shape), SD * t.tan())


@pytest.mark.parametrize("config", NETWORKS, ids=lambda c: c.kind)
def test_the_tangent_is_the_derivative_along_a_path(config):
    model, random = student(config), torch.Generator().manual_seed(1)
    sigma = levels(0.02, 0.3, 0.5, 4.0)
    x, slope = torch.randn(2, 4, *config.shape, generator=random, dtype=torch.float64)
    t, h = (sigma / SD).atan(), 1e-5
    with torch.no_grad():
        change = (at(model, x + h * slope, t + h) - at(model, x - h * slope, t - h)) / (2 * h)
    cos = t.cos().view(-1, *[1] * len(config.shape))
    torch.testing.assert_close(tangent(model, x, sigma, slope), cos * change, rtol=1e-5, atol=1e-6)


def test_without_its_share_the_tangent_is_what_is_left_of_the_teacher():
    """cos^2(t) (dx/dt - sd F): a student of the teacher's weights begins at 0."""
    model, random = student(NETWORKS[0]), torch.Generator().manual_seed(1)
    sigma, x = levels(0.1, 1.0), torch.randn(2, 3, generator=random, dtype=torch.float64)
    slope = teacher_slope(model, x, sigma, SD)
    assert tangent(model, x, sigma, slope, share=0.0).abs().max() < 1e-12
    more = tangent(model, x, sigma, slope + 1, share=0.0)
    torch.testing.assert_close(more, (angle(sigma, SD).cos ** 2)[:, None].expand(2, 3))


class Exact(nn.Module):
    """The network of the solution map of data N(0, SPREAD^2), and some of its input.

    Whatever the part, the model is the identity at 0.
    """

    def __init__(self, part=0.0):
        super().__init__()
        self.part = nn.Parameter(torch.tensor(part, dtype=torch.float64))

    def forward(self, u, c):
        sigma = (4 * c.double()).exp()[:, None]
        root = (sigma**2 + SD**2).sqrt()
        cos, sin, x = SD / root, sigma / root, SD * u
        solution = x / cos * SPREAD / (SPREAD**2 + sigma**2).sqrt()
        return (solution - cos * x) / (SD * sin) + self.part * u


def gaussian_teacher(x, sigma):
    return x * (SPREAD**2 / (SPREAD**2 + sigma**2))[:, None]


def test_the_exact_map_has_no_tangent():
    model = ConsistencyModel(Exact(), SD, 0.0)
    sigma = levels(0.01, 0.2, 1.0, 20.0)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = teacher_slope(gaussian_teacher, x, sigma, SD)
    assert tangent(model, x, sigma, slope).abs().max() < 1e-12
    assert tangent(ConsistencyModel(Exact(0.1), SD, 0.0), x, sigma, slope).abs().max() > 0.01


def test_the_slope_of_a_datum_is_that_of_the_best_teacher_in_the_mean():
    data = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher, sigma = OptimalDenoiser(data), levels(0.7)
    x = torch.tensor([[0.2, -0.4, 0.3]], dtype=torch.float64)
    cos, sin = angle(sigma, SD)
    weights = teacher.weights(x / cos, sigma)  # [1, 5]
    noise = (x - cos * data) / (sin * SD)
    slopes = cos * SD * noise - sin * data
    torch.testing.assert_close(weights @ slopes, teacher_slope(teacher, x, sigma, SD))


@pytest.mark.parametrize("taught", [True, False])
def test_the_gradient_is_the_normalized_tangent(taught):
    model = student(NETWORKS[0])
    data = SPREAD * torch.randn(6, 3, generator=torch.Generator().manual_seed(5)).double()
    teacher = gaussian_teacher if taught else None
    random = torch.Generator().manual_seed(4)
    loss = trigflow_loss(model, teacher, data, 0.6, NoiseRange(), random)
    loss.backward()
    found = [parameter.grad for parameter in model.network.parameters()]
    random = torch.Generator().manual_seed(4)
    sigma = (LAW.mean + LAW.std * torch.randn(6, generator=random, dtype=torch.float64)).exp()
    noise = torch.randn(6, 3, generator=random).double()
    t = (sigma / SD).atan()[:, None]
    x = t.cos() * data + t.sin() * SD * noise
    slope = t.cos() * SD * noise - t.sin() * data
    if taught:
        slope = (t.cos() * x - gaussian_teacher(x / t.cos(), sigma)) / t.sin()
    g = tangent(model, x, sigma, slope, 0.6)
    g = g / (g.norm(dim=1, keepdim=True) + 0.1)
    output = model.network(x / SD, sigma.log() / 4)
    expected = torch.autograd.grad((2 * g * output).sum() / g.numel(), model.network.parameters())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert loss.item() == pytest.approx(g.square().mean().item())


def test_parts_of_a_batch_sum_to_the_whole():
    model, data = student(NETWORKS[0]), torch.ones(5, 3).double()

    def loss(own):
        random = torch.Generator().manual_seed(2)
        return trigflow_loss(model, None, data, 1.0, NoiseRange(), random, own).item()

    assert loss(slice(0, 2)) + loss(slice(2, 5)) == pytest.approx(loss(slice(None)))


@pytest.mark.parametrize("taught", [True, False])
def test_descent_finds_the_exact_map(taught):
    network = Exact(0.5)
    model = ConsistencyModel(network, SD, 0.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    random = torch.Generator().manual_seed(0)
    for _ in range(150):
        data = SPREAD * torch.randn(512, 3, generator=random).double()
        optimizer.zero_grad()
        teacher = gaussian_teacher if taught else None
        trigflow_loss(model, teacher, data, 1.0, NoiseRange(), random).backward()
        optimizer.step()
    assert abs(network.part.item()) < 0.05
