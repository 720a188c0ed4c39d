"""EDM: preconditioned denoisers, their loss, and the samplers of the probability-flow ODE.

Karras et al. 2022 (arXiv 2206.00364). x = y + sigma z, with data y and z ~ N(0, I). A denoiser
D(x, sigma) estimates E[y | x]; the ODE is dx/dsigma = (x - D(x, sigma)) / sigma.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlmctl.settings.distill import Solver
from dlmctl.settings.images import NoiseLaw, NoiseRange

EVERY = slice(None)
"""All rows of a batch."""
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""From x float [N, ...] and sigma float64 [N] to the estimate of the data, float [N, ...]."""


def noise_grid(noise: NoiseRange, points: int) -> Tensor:
    """Levels from sigma_max down to sigma_min (eq. 5), float64 [points]; the ends are exact.

    A grid of one point is sigma_max.
    """
    high, low = noise.sigma_max ** (1 / noise.rho), noise.sigma_min ** (1 / noise.rho)
    share = torch.arange(points, dtype=torch.float64) / max(1, points - 1)
    sigmas = (high + share * (low - high)) ** noise.rho
    sigmas[-1], sigmas[0] = noise.sigma_min, noise.sigma_max
    return sigmas


class EdmDenoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, c_noise), with the scalings of table 1."""

    def __init__(self, network: nn.Module, sigma_data: float) -> None:
        super().__init__()
        self.network, self.sigma_data = network, sigma_data

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser`."""
        total = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = sigma * self.sigma_data / total.sqrt()
        return precondition(self.network, x, sigma, c_skip, c_out, self.sigma_data)


def precondition(
    network: nn.Module, x: Tensor, sigma: Tensor, c_skip: Tensor, c_out: Tensor, sigma_data: float
) -> Tensor:
    """c_skip x + c_out F(x / sqrt(sigma^2 + sigma_data^2), ln(sigma) / 4), in the dtype of x."""
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    output: Tensor = network(each(c_in, x) * x, (sigma.log() / 4).to(x.dtype))
    return each(c_skip, x) * x + each(c_out, x) * output


def each(values: Tensor, x: Tensor) -> Tensor:
    """Per-row numbers [N] as [N, 1, ...], in the dtype of x, to broadcast over its rows."""
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def edm_loss(
    denoiser: EdmDenoiser,
    images: Tensor,
    law: NoiseLaw,
    generator: torch.Generator,
    own: slice = EVERY,
) -> Tensor:
    """The weighted denoising loss (eq. 2 with lambda = 1 / c_out^2), a mean over batch and pixels.

    Args:
        images: float [N, ...], a batch of the data.
        generator: on the CPU; levels and noise are drawn for the whole batch.
        own: rows of the batch, at least one, whose part of the mean is returned.
    """
    normal = torch.randn(len(images), generator=generator, dtype=torch.float64)
    sigma = (law.mean + law.std * normal).exp().to(images.device)
    noise = torch.randn(images.shape, generator=generator).to(images)
    share = len(sigma[own]) / len(sigma)
    images, sigma, noise = images[own], sigma[own], noise[own]
    weight = 1 / sigma**2 + 1 / denoiser.sigma_data**2
    error = denoiser(images + each(sigma, images) * noise, sigma) - images
    return (each(weight, images) * error**2).mean() * share


def ode_step(
    denoiser: Denoiser, x: Tensor, sigma: Tensor, to: Tensor, solver: Solver = "heun"
) -> Tensor:
    """One step of the ODE from the levels `sigma` to the levels `to`, both float64 [N].

    At level 0 the slope is not defined, so that a Heun step to it is an Euler step (algorithm 1).
    Either all rows go to 0 or none does.
    """
    slope = (x - denoiser(x, sigma)) / each(sigma, x)
    h = each(to - sigma, x)
    ahead = x + h * slope
    if solver == "euler" or not bool(to.any()):
        return ahead
    return x + h * (slope + (ahead - denoiser(ahead, to)) / each(to, x)) / 2


@torch.no_grad()
def solve(
    denoiser: Denoiser, x: Tensor, sigmas: Tensor, solver: Solver = "heun", to_zero: bool = True
) -> Tensor:
    """Follow the ODE from x at sigmas[0] along `sigmas`, float64 [K]; then to 0, as in EDM.

    Heun evaluates the denoiser 2 K - 1 times, or 2 K - 2 times without the step to 0.
    """
    levels = torch.cat([sigmas, sigmas.new_zeros(1)]) if to_zero else sigmas
    levels = levels.to(x.device)
    for sigma, to in itertools.pairwise(levels):
        x = ode_step(denoiser, x, sigma.expand(len(x)), to.expand(len(x)), solver)
    return x


class OptimalDenoiser(nn.Module):
    """E[y | x] for data that are exactly these images: the perfect memorizer.

    D(x, sigma) = sum_i w_i x_i with w = softmax_i(-|x - x_i|^2 / (2 sigma^2)): the minimizer of the
    denoising loss over all functions, as in Gu et al. (arXiv 2310.02664). Its samples are images
    of the set.
    """

    images: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.register_buffer("images", images.double(), persistent=False)

    def weights(self, x: Tensor, sigma: Tensor) -> Tensor:
        """w, float64 [N, M] for M images."""
        data = self.images.flatten(1)
        # |x|^2 is the same for all images; in double precision the rest does not cancel badly.
        scores = x.double().flatten(1) @ data.T - data.square().sum(1) / 2
        return (scores / sigma.double()[:, None] ** 2).softmax(1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `Denoiser`."""
        mixed = self.weights(x, sigma) @ self.images.flatten(1)
        return mixed.view(x.shape).to(x.dtype)
