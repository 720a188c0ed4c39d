"""Consistency models: the map from a point of the ODE to its start, and ways to train it by pairs
of points; `trigflow` has those in continuous time.

Song et al. 2023 (arXiv 2303.01469), parameterized as in EDM. f(x, sigma) is the point at the
smallest level eps on the path through x at sigma; with

    f(x, sigma) = c_skip x + c_out F(c_in x, c_noise)
    c_skip = sd^2 / ((sigma - eps)^2 + sd^2)      c_out = (sigma - eps) sd / sqrt(sigma^2 + sd^2)

f(x, eps) = x holds exactly, and F has the form of the denoiser's network, so that the teacher's
weights can initialize it. For neighbouring levels t > s of the grid, x_t = y + t z, and a target f'
that takes no gradient:

    cd    |f(x_t, t) - f'(x_s, s)|, x_s from x_t by one step of the ODE of a frozen teacher
    ct    |f(x_t, t) - f'(y + s z, s)|, which needs no teacher
    ect   as ct, weighted by 1 / (t - s), at s = r(t), which approaches t in stages (Geng et al.,
          arXiv 2406.14548)

The grid and mu, the decay of the target, are fixed for ct too (ours). In the published ct,
N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 grows over its K steps, with
mu(k) = exp(s0 ln(mu0) / N(k)); that schedule is not implemented. The clamp of ect's levels to
[2 sigma_min, sigma_max] is ours: the published distribution is not bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dlmctl.distill.edm import EVERY, Denoiser, each, noise_grid, ode_step, precondition
from dlmctl.settings.distill import Distillation, Metric, Solver
from dlmctl.settings.images import NoiseLaw, NoiseRange

HUBER = 0.00054
"""c of the pseudo-Huber loss, divided by the square root of the dimension (Song and Dhariwal,
arXiv 2310.14189)."""
ECT_LAW = NoiseLaw(-1.1, 2.0)


class ConsistencyModel(nn.Module):
    """f(x, sigma), with the interface of a denoiser: both estimate data."""

    def __init__(self, network: nn.Module, sigma_data: float, sigma_min: float) -> None:
        super().__init__()
        self.network, self.sigma_data, self.sigma_min = network, sigma_data, sigma_min

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x float [N, ...] and sigma [N], not below eps, to float [N, ...]."""
        c_skip = self.sigma_data**2 / (self._beyond(sigma) ** 2 + self.sigma_data**2)
        return precondition(self.network, x, sigma, c_skip, self.c_out(sigma), self.sigma_data)

    def c_out(self, sigma: Tensor) -> Tensor:
        """How much of the network's output is in f at these levels."""
        return self._beyond(sigma) * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def _beyond(self, sigma: Tensor) -> Tensor:
        # In the dtype of sigma, so that eps - eps is exactly 0.
        return sigma - torch.tensor(self.sigma_min, dtype=sigma.dtype, device=sigma.device)


class LevelPair(NamedTuple):
    """What a training step compares: f(x, sigma) with the target at (to_x, to)."""

    x: Tensor
    """float [N, ...]."""
    sigma: Tensor
    """float64 [N]."""
    to_x: Tensor
    to: Tensor
    """float64 [N]; if it is below eps, the target is `data`."""
    data: Tensor


def cd_pair(
    teacher: Denoiser, data: Tensor, noise: Tensor, sigma: Tensor, to: Tensor, solver: Solver
) -> LevelPair:
    """Consistency distillation: a step of the teacher's ODE leads from the first point to the
    second."""
    x = data + each(sigma, data) * noise
    with torch.no_grad():
        to_x = ode_step(teacher, x, sigma, to, solver)
    return LevelPair(x, sigma, to_x, to, data)


def ct_pair(data: Tensor, noise: Tensor, sigma: Tensor, to: Tensor) -> LevelPair:
    """Consistency training: both points have the same data and noise, each at its level."""
    x = data + each(sigma, data) * noise
    return LevelPair(x, sigma, data + each(to, data) * noise, to, data)


def ect_level(sigma: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)), not below 0.

    Args:
        sigma: t, float64 [N].
        stage: from 0 on; each brings r closer to t by a factor of q.
    """
    share = 1 - (1 + k * torch.sigmoid(-b * sigma)) / q ** (stage + 1)
    return (sigma * share).clamp_min(0)


def consistency_loss(
    model: ConsistencyModel, target: ConsistencyModel, pair: LevelPair, metric: Metric
) -> Tensor:
    """The distance of f(x, sigma) from the target, float [N]; the target takes no gradient.

    l2 is the mean square over the pixels; huber is sqrt(|d|^2 + c^2) - c with c = 0.00054 sqrt(D).
    """
    eps = model.sigma_min
    with torch.no_grad():
        goal = target(pair.to_x, pair.to.clamp_min(eps))
        goal = torch.where(each(pair.to, goal) < eps, pair.data, goal)
    square = (model(pair.x, pair.sigma) - goal).flatten(1).square()
    if metric == "l2":
        return square.mean(1)
    c = HUBER * math.sqrt(square.shape[1])
    return (square.sum(1) + c**2).sqrt() - c


def distillation_loss(
    plan: Distillation,
    model: ConsistencyModel,
    target: ConsistencyModel,
    teacher: Denoiser | None,
    data: Tensor,
    stage: int,
    noise_range: NoiseRange,
    generator: torch.Generator,
    own: slice = EVERY,
) -> Tensor:
    """The mean loss of a batch.

    Args:
        teacher: for cd.
        data: float [N, ...].
        stage: of ect, from 0 on.
        generator: on the CPU; levels and noise are drawn for the whole batch.
        own: rows of the batch, at least one, whose part of the mean is returned.
    """
    count, device = len(data), data.device
    if plan.objective == "ect":
        normal = torch.randn(count, generator=generator, dtype=torch.float64)
        sigma = (ECT_LAW.mean + ECT_LAW.std * normal).exp()
        # Ours: the published law has no bounds, but f is defined for levels from eps on.
        sigma = sigma.clamp(2 * noise_range.sigma_min, noise_range.sigma_max).to(device)
        to = ect_level(sigma, stage)
    else:
        index = torch.randint(plan.scales - 1, (count,), generator=generator)
        grid = noise_grid(noise_range, plan.scales)
        sigma, to = grid[index].to(device), grid[index + 1].to(device)
    noise = torch.randn(data.shape, generator=generator).to(data)
    data, noise, sigma, to = data[own], noise[own], sigma[own], to[own]
    if plan.objective == "cd":
        assert teacher is not None
        pair = cd_pair(teacher, data, noise, sigma, to, plan.solver)
    else:
        pair = ct_pair(data, noise, sigma, to)
    losses = consistency_loss(model, target, pair, plan.metric)
    if plan.objective == "ect":
        losses = losses / (sigma - to).to(losses)
    elif plan.weight == "cout":
        losses = losses / model.c_out(sigma).to(losses)
    return losses.mean() * (len(data) / count)


@torch.no_grad()
def sample_steps(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    sigma_min: float,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Samples from x at sigmas[0], with one evaluation per level (algorithm 1).

    Args:
        x: float [N, ...], of scale sigmas[0].
        sigmas: float64 [K], falling.
        noise: fresh standard noise like x for step 1, 2, …
    """
    levels = sigmas.to(x.device)
    samples = model(x, levels[0].expand(len(x)))
    for step, sigma in enumerate(levels[1:], start=1):
        spread = (sigma**2 - sigma_min**2).clamp_min(0).sqrt().to(x.dtype)
        samples = model(samples + spread * noise(step), sigma.expand(len(x)))
    return samples
