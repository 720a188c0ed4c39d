"""Consistency models on Gaussian data, where the solution map is known."""

import itertools
import math

import pytest
import torch
from torch import nn

from dlmctl.distill.consistency_model import (
    HUBER,
    ConsistencyModel,
    LevelPair,
    cd_pair,
    consistency_loss,
    ct_pair,
    distillation_loss,
    ect_level,
    sample_steps,
)
from dlmctl.distill.edm import OptimalDenoiser, noise_grid
from dlmctl.distill.image_networks import NetworkConfig, make_network
from dlmctl.settings.distill import Distillation
from dlmctl.settings.images import NoiseLaw, NoiseRange

SD, EPS = 0.7, 0.002


class Solution(nn.Module):
    """f(x, sigma) of data N(0, SD^2), times a scale that can be learned."""

    sigma_min = EPS

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, x, sigma):
        shrink = ((SD**2 + EPS**2) / (SD**2 + sigma**2)).sqrt()
        return self.scale * x * shrink.to(x.dtype)[:, None]


def teacher(x, sigma):
    return x * (SD**2 / (SD**2 + sigma**2)).to(x.dtype)[:, None]


def batch(count, sigma, to, seed=0):
    random = torch.Generator().manual_seed(seed)
    data = SD * torch.randn(count, 3, generator=random, dtype=torch.float64)
    noise = torch.randn(count, 3, generator=random, dtype=torch.float64)
    level = torch.full((count,), sigma, dtype=torch.float64)
    return data, noise, level, torch.full((count,), to, dtype=torch.float64)


def network(kind="mlp", shape=(4,)):
    torch.manual_seed(0)
    made = make_network(NetworkConfig(kind, shape, 16, (1, 2), 1))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.5)
    return made


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "shape"), [("mlp", (4,)), ("unet", (1, 8, 8))])
def test_the_boundary_is_bit_exact(kind, shape, precision):
    for eps in (0.002, 0.01, 0.003):
        model = ConsistencyModel(network(kind, shape), 0.5, eps)
        x = 3 * torch.randn(6, *shape)
        assert torch.equal(model(x, torch.full((6,), eps, dtype=precision)), x)
        # And it is the boundary alone that does it.
        assert not torch.equal(model(x, torch.full((6,), 2 * eps, dtype=precision)), x)
        grid = noise_grid(NoiseRange(eps), 5)
        assert torch.equal(model(x, grid[-1].expand(6)), x)


def test_the_scalings_are_those_of_the_paper():
    class Network(nn.Module):
        def forward(self, x, c):
            return x + c[:, None]

    sigma, x = torch.tensor([0.4, 30.0], dtype=torch.float64), torch.randn(2, 3).double()
    found = ConsistencyModel(Network(), SD, EPS)(x, sigma)
    for row, s, made in zip(x, sigma.tolist(), found, strict=True):
        total = math.sqrt(s**2 + SD**2)
        skip, out = SD**2 / ((s - EPS) ** 2 + SD**2), (s - EPS) * SD / total
        torch.testing.assert_close(made, skip * row + out * (row / total + math.log(s) / 4))


@pytest.mark.parametrize(("solver", "order"), [("heun", 3), ("euler", 2)])
def test_the_exact_map_leaves_the_error_of_one_step(solver, order):
    away = []
    for h in (0.04, 0.02, 0.01):
        data, noise, sigma, to = batch(50, 1.0, 1.0 - h)
        pair = cd_pair(teacher, data, noise, sigma, to, solver)
        exact = Solution()
        away.append(consistency_loss(exact, exact, pair, "l2").mean().sqrt().item())
    for coarse, fine in itertools.pairwise(away):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


def test_the_exact_map_loses_nothing_on_exact_steps():
    data, noise, sigma, to = batch(20, 2.0, 0.3)
    x = data + 2.0 * noise
    exact = x * math.sqrt((SD**2 + 0.3**2) / (SD**2 + 2.0**2))
    pair = LevelPair(x, sigma, exact, to, data)
    assert consistency_loss(Solution(), Solution(), pair, "l2").max() < 1e-30
    assert consistency_loss(Solution(1.1), Solution(), pair, "l2").min()


def test_the_gradient_stops_at_the_target():
    data, noise, sigma, to = batch(20, 2.0, 1.0)
    model = Solution(1.1)
    pair = ct_pair(data, noise, sigma, to)
    loss = consistency_loss(model, model, pair, "l2").mean()
    loss.backward()
    rows = [model(pair.x, sigma).detach(), model(pair.to_x, to).detach()]
    expected = (2 * (rows[0] - rows[1]) * rows[0] / 1.1).mean().item()
    assert model.scale.grad.item() == pytest.approx(expected, rel=1e-9)


def test_consistency_training_is_distillation_of_the_one_image_there_is():
    """Of one image the paths are straight, so that any step of the ODE is exact."""
    data = torch.randn(1, 3, dtype=torch.float64)
    noise = torch.randn(1, 3, dtype=torch.float64)
    sigma, to = (torch.tensor([s], dtype=torch.float64) for s in (1.7, 0.4))
    plain = ct_pair(data, noise, sigma, to)
    torch.testing.assert_close(plain.to_x, data + 0.4 * noise)
    for solver in ("heun", "euler"):
        pair = cd_pair(OptimalDenoiser(data), data, noise, sigma, to, solver)
        torch.testing.assert_close(pair.to_x, plain.to_x)
        torch.testing.assert_close(pair.x, plain.x)


def test_the_levels_of_ect():
    t = torch.tensor([0.01, 1.0, 5.0, 80.0], dtype=torch.float64)
    for stage in range(6):
        for sigma, r in zip(t.tolist(), ect_level(t, stage).tolist(), strict=True):
            sigmoid = 1 / (1 + math.exp(sigma))
            expected = max(0.0, sigma * (1 - (1 + 8 * sigmoid) / 2 ** (stage + 1)))
            assert r == pytest.approx(expected, abs=1e-12)
    # At first the data are the target of small levels; at last the levels meet.
    assert ect_level(t, 0)[:2].tolist() == [0.0, 0.0]
    assert ect_level(t, 0)[3].item() == pytest.approx(40.0)
    torch.testing.assert_close(ect_level(t, 40), t)


def test_below_the_smallest_level_the_target_is_the_data():
    data, noise, sigma, to = batch(5, 0.5, 0.0)
    model = ConsistencyModel(network(shape=(3,)).double(), SD, EPS)
    pair = ct_pair(data, noise, sigma, to)
    found = consistency_loss(model, model, pair, "l2")
    torch.testing.assert_close(found, (model(pair.x, sigma) - data).square().mean(1))


def test_the_distances():
    data, noise, sigma, to = batch(5, 2.0, 1.0)
    model, target = Solution(1.2), Solution()
    pair = ct_pair(data, noise, sigma, to)
    away = (model(pair.x, sigma) - target(pair.to_x, to)).detach()
    c = HUBER * math.sqrt(3)
    square, huber = (consistency_loss(model, target, pair, m).detach() for m in ("l2", "huber"))
    torch.testing.assert_close(square, away.square().mean(1))
    torch.testing.assert_close(huber, (away.norm(dim=1) ** 2 + c**2).sqrt() - c)
    same = LevelPair(pair.x, sigma, pair.x, sigma, data)
    loss = consistency_loss(target, target, same, "huber").sum()
    loss.backward()
    assert loss.item() == 0
    assert target.scale.grad.isfinite()


def losses(plan, model, count=4000, seed=0):
    data = SD * torch.randn(count, 3, generator=torch.Generator().manual_seed(9)).double()
    random = torch.Generator().manual_seed(seed)
    return distillation_loss(plan, model, model, teacher, data, 0, NoiseRange(), random)


def test_the_exact_map_is_better_than_others_for_distillation():
    """And the finer the grid, the nearer to 0 its loss."""
    exact, wrong = Solution(), Solution(1.05)
    coarse, fine = (losses(Distillation("cd", scales=n), exact).item() for n in (20, 80))
    assert fine < coarse / 100
    assert losses(Distillation("cd", scales=80), wrong).item() > 0


def test_a_pair_is_of_neighbours_of_the_grid():
    seen = []

    class Recorder(Solution):
        def forward(self, x, sigma):
            seen.append(sigma)
            return super().forward(x, sigma)

    losses(Distillation("ct", scales=5), Recorder())
    grid = noise_grid(NoiseRange(), 5)
    to, sigma = seen
    for high, low in itertools.pairwise(grid):
        chosen = sigma == high
        assert 0.2 < chosen.double().mean() < 0.3
        assert bool((to[chosen] == low).all())


def test_a_pair_is_weighted_by_what_the_network_has_to_say():
    """With a grid of two points the level is known, and so is the factor."""
    model = ConsistencyModel(network(shape=(3,)).double(), SD, EPS)
    high = NoiseRange().sigma_max
    c_out = (high - EPS) * SD / math.sqrt(high**2 + SD**2)
    for metric in ("l2", "huber"):
        plans = [Distillation("ct", scales=2, metric=metric, weight=w) for w in ("uniform", "cout")]
        uniform, weighted = (losses(plan, model, count=50).item() for plan in plans)
        assert weighted == pytest.approx(uniform / c_out)


def test_ect_is_weighted_by_the_distance_of_its_levels(monkeypatch):
    """With one level, t = 3, r is known, and so is the factor."""
    from dlmctl.distill import consistency_model as consistency

    monkeypatch.setattr(consistency, "ECT_LAW", NoiseLaw(math.log(3.0), 0.0))
    plan = Distillation("ect", metric="l2", target_ema=0, stage_steps=10)
    data, model = SD * torch.randn(30, 3).double(), Solution(1.3)
    for step, stage in ((0, 0), (9, 0), (10, 1), (25, 2)):
        random = torch.Generator().manual_seed(4)
        found_stage = int(step // plan.steps_per_stage(1000))
        assert found_stage == stage
        found = distillation_loss(plan, model, model, None, data, stage, NoiseRange(), random)
        random = torch.Generator().manual_seed(4)
        torch.randn(30, generator=random, dtype=torch.float64)
        noise = torch.randn(data.shape, generator=random).double()
        sigma = torch.full((30,), 3.0, dtype=torch.float64)
        to = ect_level(sigma, stage)
        pair = ct_pair(data, noise, sigma, to)
        expected = consistency_loss(model, model, pair, "l2").mean() / (3.0 - to[0])
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_of_the_exact_map_have_the_variance_of_the_data(steps):
    random = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(20_000, 1, generator=random).double()
    sigmas = noise_grid(NoiseRange(), steps + 1)[:-1]
    made = sample_steps(
        Solution(), x, sigmas, EPS, lambda _: torch.randn(x.shape, generator=random).double()
    )
    assert made.std().item() == pytest.approx(SD, rel=0.02)


def test_steps_evaluate_the_model_at_their_levels():
    seen = []

    def model(x, sigma):
        seen.append(sigma[0].item())
        return torch.zeros_like(x)

    noises = []

    def noise(step):
        noises.append(step)
        return torch.ones(2, 1)

    sigmas = torch.tensor([80.0, 5.0, 0.4], dtype=torch.float64)
    sample_steps(model, torch.ones(2, 1), sigmas, EPS, noise)
    assert seen == sigmas.tolist()
    assert noises == [1, 2]
