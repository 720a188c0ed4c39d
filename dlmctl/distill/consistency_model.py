"""Consistency models: the map from a point of the ODE to its beginning, and three ways to train it.

Song et al. 2023 (arXiv 2303.01469), in the frame of EDM. f(x, sigma) is the point at the smallest
level eps on the path through x at sigma; with

    f(x, sigma) = c_skip x + c_out F(c_in x, c_noise)
    c_skip = sd^2 / ((sigma - eps)^2 + sd^2)      c_out = (sigma - eps) sd / sqrt(sigma^2 + sd^2)

f(x, eps) = x holds exactly, and F is that of the denoiser, so that a teacher's weights begin it.
For two neighbours t > s of the grid, x_t = y + t z, and a target f' that takes no gradient:

    cd    |f(x_t, t) - f'(x_s, s)|, x_s from x_t by one step of the ODE of a frozen teacher
    ct    |f(x_t, t) - f'(y + s z, s)|, which needs no teacher
    ect   the same at s = r(t), that nears t in stages (Geng et al., arXiv 2406.14548), by 1 / (t-s)

Both grid and mu, the decay of the target, are fixed for ct too (ours). The published ct lets
N(k) = ceil(sqrt(k/K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1 grow over its K steps, with
mu(k) = exp(s0 ln(mu0) / N(k)); that schedule is not here. The clamp of ect's levels to
[2 sigma_min, sigma_max] is ours: its published law is not bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dlmctl.distill.edm import (
    EVERY,
    Denoiser,
    NoiseLaw,
    NoiseRange,
    Solver,
    each,
    ode_step,
    precondition,
)

Objective = Literal["cd", "ct", "ect"]
Metric = Literal["l2", "huber"]
HUBER = 0.00054
"""c of the pseudo-Huber loss by the square root of the dimension (Song and Dhariwal,
arXiv 2310.14189)."""
ECT_LAW = NoiseLaw(-1.1, 2.0)
ECT_STAGES = 8
"""Of the published recipe, which halves the distance after every 3.2 of 25.6 million images; in the
last stage r is above 0.98 t."""


class ConsistencyModel(nn.Module):
    """f(x, sigma), with the interface of a denoiser: both estimate data."""

    def __init__(self, network: nn.Module, sigma_data: float, sigma_min: float) -> None:
        super().__init__()
        self.network, self.sigma_data, self.sigma_min = network, sigma_data, sigma_min

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x float [N, ...] and sigma [N], not below eps, to float [N, ...]."""
        # In the dtype of sigma, so that eps less itself is 0 in any.
        beyond = sigma - torch.tensor(self.sigma_min, dtype=sigma.dtype, device=sigma.device)
        c_skip = self.sigma_data**2 / (beyond**2 + self.sigma_data**2)
        c_out = beyond * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()
        return precondition(self.network, x, sigma, c_skip, c_out, self.sigma_data)


class Pair(NamedTuple):
    """What a step of training compares: f(x, sigma) with the target at (to_x, to)."""

    x: Tensor
    """float [N, ...]."""
    sigma: Tensor
    """float64 [N]."""
    to_x: Tensor
    to: Tensor
    """float64 [N]; where it is below eps, the target is `data`."""
    data: Tensor


def cd_pair(
    teacher: Denoiser, data: Tensor, noise: Tensor, sigma: Tensor, to: Tensor, solver: Solver
) -> Pair:
    """Consistency distillation: the second point is a step of the teacher's ODE from the first."""
    x = data + each(sigma, data) * noise
    with torch.no_grad():
        to_x = ode_step(teacher, x, sigma, to, solver)
    return Pair(x, sigma, to_x, to, data)


def ct_pair(data: Tensor, noise: Tensor, sigma: Tensor, to: Tensor) -> Pair:
    """Consistency training: the second point has the same data and noise, at its level."""
    x = data + each(sigma, data) * noise
    return Pair(x, sigma, data + each(to, data) * noise, to, data)


def ect_level(sigma: Tensor, stage: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    """r = t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1)), not below 0.

    Args:
        sigma: t, float64 [N].
        stage: from 0 on; each brings r nearer to t by a factor of q.
    """
    share = 1 - (1 + k * torch.sigmoid(-b * sigma)) / q ** (stage + 1)
    return (sigma * share).clamp_min(0)


def consistency_loss(
    model: ConsistencyModel, target: ConsistencyModel, pair: Pair, metric: Metric
) -> Tensor:
    """The distance of f(x, sigma) from the target, float [N]; no gradient through the target.

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


@dataclass(frozen=True)
class Distillation:
    """How a student is trained. The defaults for cd are those of its published code, except the
    metric, which there is a perceptual distance."""

    objective: Objective = "cd"
    solver: Solver = "heun"
    scales: int = 40
    """Points of the grid, for cd and ct."""
    target_ema: float = 0.95
    """Of the target network; 0 takes the student itself."""
    metric: Metric = "l2"
    stage_steps: float = 1000
    """Steps between the stages of ect, not always a whole number."""

    def stage(self, step: int) -> int:
        """The stage of ect, from 0 on, that a step from 0 on is in."""
        return int(step // self.stage_steps)

    def loss(
        self,
        model: ConsistencyModel,
        target: ConsistencyModel,
        teacher: Denoiser | None,
        data: Tensor,
        step: int,
        noise_range: NoiseRange,
        generator: torch.Generator,
        own: slice = EVERY,
    ) -> Tensor:
        """The mean loss of a batch.

        Args:
            teacher: of cd.
            data: float [N, ...].
            step: from 0 on; ect has stages.
            generator: on the CPU, of levels and noise, which are drawn for the whole batch.
            own: the rows whose part of the mean this is; one at least.
        """
        count, device = len(data), data.device
        if self.objective == "ect":
            normal = torch.randn(count, generator=generator, dtype=torch.float64)
            sigma = (ECT_LAW.mean + ECT_LAW.std * normal).exp()
            # Ours: the published law has no bounds, and f is of levels from eps on.
            sigma = sigma.clamp(2 * noise_range.sigma_min, noise_range.sigma_max).to(device)
            to = ect_level(sigma, self.stage(step))
        else:
            index = torch.randint(self.scales - 1, (count,), generator=generator)
            grid = noise_range.grid(self.scales)
            sigma, to = grid[index].to(device), grid[index + 1].to(device)
        noise = torch.randn(data.shape, generator=generator).to(data)
        data, noise, sigma, to = data[own], noise[own], sigma[own], to[own]
        if self.objective == "cd":
            assert teacher is not None
            pair = cd_pair(teacher, data, noise, sigma, to, self.solver)
        else:
            pair = ct_pair(data, noise, sigma, to)
        each_loss = consistency_loss(model, target, pair, self.metric)
        if self.objective == "ect":
            each_loss = each_loss / (sigma - to).to(each_loss)
        return each_loss.mean() * (len(data) / count)


@torch.no_grad()
def sample_steps(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    sigmas: Tensor,
    sigma_min: float,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Samples from x at sigmas[0] in as many evaluations as there are levels (algorithm 1).

    Args:
        x: float [N, ...], of the scale sigmas[0].
        sigmas: float64 [K], falling.
        noise: fresh standard noise like x for step 1, 2, …
    """
    levels = sigmas.to(x.device)
    made = model(x, levels[0].expand(len(x)))
    for step, sigma in enumerate(levels[1:], start=1):
        spread = (sigma**2 - sigma_min**2).clamp_min(0).sqrt().to(x.dtype)
        made = model(made + spread * noise(step), sigma.expand(len(x)))
    return made
