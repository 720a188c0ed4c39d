"""Consistency models in continuous time, sCD and sCT (Lu and Song, arXiv 2410.11081).

With t = atan(sigma / sd), for data of standard deviation sd and noise of the same,

    x_t = cos(t) y + sin(t) sd z      f(x_t, t) = cos(t) x_t - sin(t) sd F(x_t / sd, t)

which is the denoiser of EDM at x_t / cos(t) and sigma, F the negative of its network's output; a
teacher's weights fit. Along the ODE f is constant. The loss moves F against cos(t) df/dt, which is

    g = -cos^2(t) (sd F - dx/dt) - r (cos(t) sin(t) x_t + sd cos(t) sin(t) dF/dt)

normalized to g / (|g| + 0.1); r grows from 0 to 1. dx/dt is sd F of the teacher (scd), or
cos(t) sd z - sin(t) y (sct), whose mean given x_t that is. The published loss has a further factor,
which a second network learns for each t; it is left out here (ours).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dlmctl.distill.consistency_model import ConsistencyModel
from dlmctl.distill.edm import EVERY, Denoiser, each
from dlmctl.settings.images import NoiseLaw, NoiseRange

LAW = NoiseLaw(-1.0, 1.4)
"""Of ln sigma; published for CIFAR-10."""
LEAST_NORM = 0.1
"""Added to the norm of g."""


class Angle(NamedTuple):
    """cos(t) and sin(t), float64 [N]."""

    cos: Tensor
    sin: Tensor


def angle(sigma: Tensor, sigma_data: float) -> Angle:
    """That of a noise level, float64 [N]."""
    root = (sigma**2 + sigma_data**2).sqrt()
    return Angle(sigma_data / root, sigma / root)


def teacher_slope(teacher: Denoiser, x: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """dx/dt of a teacher's ODE at x_t, float [N, ...]."""
    cos, sin = (each(part, x) for part in angle(sigma, sigma_data))
    return (cos * x - teacher(x / cos, sigma)) / sin


@torch.no_grad()
def tangent(
    model: ConsistencyModel, x: Tensor, sigma: Tensor, slope: Tensor, share: float = 1.0
) -> Tensor:
    """g, float [N, ...], before it is normalized.

    Args:
        x: x_t, float [N, ...].
        sigma: float64 [N].
        slope: dx/dt, like x.
        share: r, from 0 to 1.
    """
    cos, sin = (each(part, x) for part in angle(sigma, model.sigma_data))
    level = (sigma.log() / 4).to(x.dtype)
    # The derivative of ln(sd tan(t)) / 4 is 1 / (4 cos(t) sin(t)).
    rates = (cos * sin * slope / model.sigma_data, torch.full_like(level, 0.25))
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
        given = (x / model.sigma_data, level)
        output, change = torch.func.jvp(model.network, given, rates)
    # F and its derivative are the negatives of these.
    still = -(cos**2) * (-model.sigma_data * output - slope)
    moving = cos * sin * x - model.sigma_data * change
    return still - share * moving


def trigflow_loss(
    model: ConsistencyModel,
    teacher: Denoiser | None,
    data: Tensor,
    share: float,
    noise_range: NoiseRange,
    generator: torch.Generator,
    own: slice = EVERY,
) -> Tensor:
    """The mean loss of a batch.

    Args:
        teacher: None for sct.
        data: float [N, ...].
        share: r, from 0 to 1.
        generator: on the CPU; levels and noise are drawn for the whole batch.
        own: rows of the batch, at least one, whose part of the mean is returned.
    """
    normal = torch.randn(len(data), generator=generator, dtype=torch.float64)
    sigma = (LAW.mean + LAW.std * normal).exp()
    sigma = sigma.clamp(noise_range.sigma_min, noise_range.sigma_max).to(data.device)
    noise = torch.randn(data.shape, generator=generator).to(data)
    rows = len(data[own]) / len(data)
    data, noise, sigma, sd = data[own], noise[own], sigma[own], model.sigma_data
    cos, sin = (each(part, data) for part in angle(sigma, sd))
    x = cos * data + sin * sd * noise
    slope = cos * sd * noise - sin * data
    if teacher is not None:
        with torch.no_grad():
            slope = teacher_slope(teacher, x, sigma, sd)
    g = tangent(model, x, sigma, slope, share)
    g = g / (each(g.flatten(1).norm(dim=1), g) + LEAST_NORM)
    output = model.network(x / sd, (sigma.log() / 4).to(x.dtype))
    return (output - output.detach() + g).square().mean() * rows
