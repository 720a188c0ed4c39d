"""U-Nets of diffusers as denoisers and as consistency models, in the coordinates of EDM.

A discrete process (DDPM, Ho et al. 2020) has x_t = sqrt(a_t) y + sqrt(1 - a_t) z at timesteps
t = 0, …, T - 1. Divided by sqrt(a_t) it is EDM's x = y + sigma z with

    sigma_t = sqrt((1 - a_t) / a_t)        x_t = x / sqrt(1 + sigma^2)

and the network's output o at (x_t, t) gives the denoiser D of EDM, exactly at the timesteps:

    epsilon          D = x - sigma o
    v_prediction     D = x / (1 + sigma^2) - sigma o / sqrt(1 + sigma^2)
    sample           D = o

Between two timesteps t is interpolated linearly in ln sigma, as Euler schedulers of diffusers do,
and the network's sines take the fraction. One Euler step of EDM's ODE is one step of DDIM with
eta 0 (Song et al., arXiv 2010.02502).

Students of such a teacher have the form of latent consistency models (Luo et al., arXiv
2310.04378), which `LCMScheduler` samples, with k = `timestep_scaling`, 10 by default:

    f(x, sigma) = c_skip x_t + c_out D       c_skip = 0.25 / ((k t)^2 + 0.25)
                                             c_out = k t / sqrt((k t)^2 + 0.25)

f is x_0, the input at the first timestep, there. Schedulers of EDM and of consistency models give
the network's own preconditioning, that of `edm` and `consistency_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlmctl.distill.consistency_model import ConsistencyModel
from dlmctl.distill.edm import each

Prediction = Literal["epsilon", "v_prediction", "sample"]
VARIANCE_PRESERVING = 1.0
"""sigma_data with which EDM's scaled input is x_t."""
LCM_SIGMA_DATA = 0.5
SHARP = 1e4
"""`timestep_scaling` of a student in continuous time, whose f is D but for the first timestep."""
CM_TIME = 250.0
"""Consistency models of diffusers take 1000 ln(sigma) / 4 as their time."""


@dataclass(frozen=True)
class DiffusersConfig:
    """A network of diffusers, as a checkpoint's dlmctl.json has it."""

    shape: tuple[int, ...]
    """Of an input without the batch dimension: (C, H, W)."""
    unet: Mapping[str, Any]
    """Its config.json."""
    scheduler: Mapping[str, Any]
    """Its scheduler_config.json."""
    autoencoder: str | None = None
    """Directory of the VAE between images and latents; None for a model of pixels."""
    text: str | None = None
    """Directory of the pipeline with the text encoder; None for an unconditional model."""

    @property
    def scheduler_class(self) -> str:
        """The scheduler's class."""
        return str(self.scheduler["_class_name"])


def log_levels(alphas_cumprod: Tensor) -> Tensor:
    """ln sigma_t of a process with these a_t, float64 [T], rising."""
    kept = alphas_cumprod.double()
    return (torch.log1p(-kept) - kept.log()) / 2


def timestep_at(log_sigma: Tensor, table: Tensor) -> Tensor:
    """The timestep, a fraction between two, at which ln sigma has a value.

    Args:
        log_sigma: float64 [N].
        table: ln sigma_t, float64 [T], rising, T at least 2.
    """
    after = torch.searchsorted(table, log_sigma.detach().contiguous()).clamp(1, len(table) - 1)
    low, high = table[after - 1], table[after]
    return after - 1 + (log_sigma - low) / (high - low)


class DiscreteUnet(nn.Module):
    """A U-Net of a discrete process; `forward` is F of EDM with sigma_data 1."""

    table: Tensor

    def __init__(self, unet: nn.Module, table: Tensor, prediction: Prediction) -> None:
        super().__init__()
        self.unet, self.prediction = unet, prediction
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """F(x_t, ln(sigma) / 4) of x_t float [N, C, H, W] and float [N], like x_t."""
        log_sigma = 4 * c.double()
        sigma, output = log_sigma.exp(), self._output(x, log_sigma)
        root = (1 + sigma**2).sqrt()
        if self.prediction == "v_prediction":
            return -output
        if self.prediction == "epsilon":
            return each(sigma, x) * x - each(root, x) * output
        return each(root / sigma, x) * output - each(1 / sigma, x) * x

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D(x, sigma), as `edm.Denoiser`."""
        root = (1 + sigma**2).sqrt()
        output = self._output(each(1 / root, x) * x, sigma.double().log())
        if self.prediction == "v_prediction":
            return each(1 / root**2, x) * x - each(sigma / root, x) * output
        return x - each(sigma, x) * output if self.prediction == "epsilon" else output

    def of_output(self, sigma: Tensor) -> Tensor:
        """How much of the network's output is in D, up to its sign."""
        if self.prediction == "sample":
            return torch.ones_like(sigma)
        return sigma if self.prediction == "epsilon" else sigma / (1 + sigma**2).sqrt()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Of levels float64 [N], float64 [N]."""
        return timestep_at(sigma.log(), self.table)

    def _output(self, x: Tensor, log_sigma: Tensor) -> Tensor:
        time = timestep_at(log_sigma, self.table).to(x.dtype)
        output: Tensor = self.unet(x, time, return_dict=False)[0]
        return output


class LevelUnet(nn.Module):
    """A U-Net whose time is a multiple of ln(sigma) / 4, as F(x, c)."""

    def __init__(self, unet: nn.Module, scale: float, sign: int) -> None:
        super().__init__()
        self.unet, self.scale, self.sign = unet, scale, sign

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Float [N, C, H, W] and float [N] to float [N, C, H, W]."""
        output: Tensor = self.unet(x, self.scale * c, return_dict=False)[0]
        return self.sign * output


class DiscreteDenoiser(nn.Module):
    """D(x, sigma), clamped to what the scheduler clamps it to, if at all."""

    def __init__(self, network: DiscreteUnet, clip: float | None) -> None:
        super().__init__()
        self.network, self.clip = network, clip

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """See `edm.Denoiser`."""
        return clipped(self.network.denoise(x, sigma), self.clip)


class LatentConsistencyModel(ConsistencyModel):
    """f(x, sigma) as `LCMScheduler` computes it."""

    network: DiscreteUnet

    def __init__(
        self, network: DiscreteUnet, sigma_min: float, scaling: float, clip: float | None = None
    ) -> None:
        super().__init__(network, VARIANCE_PRESERVING, sigma_min)
        self.scaling, self.clip = scaling, clip

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x float [N, ...] and sigma float64 [N], not below sigma_0, to float [N, ...]."""
        root = (1 + sigma**2).sqrt()
        c_skip = LCM_SIGMA_DATA**2 / self._spread(sigma)
        data = clipped(self.network.denoise(x, sigma), self.clip)
        return each(self._of_data(sigma), x) * data + each(c_skip / root, x) * x

    def c_out(self, sigma: Tensor) -> Tensor:
        """How much of the network's output is in f at these levels."""
        return self._of_data(sigma) * self.network.of_output(sigma)

    def _of_data(self, sigma: Tensor) -> Tensor:
        return self._scaled(sigma) / self._spread(sigma).sqrt()

    def _scaled(self, sigma: Tensor) -> Tensor:
        return self.scaling * self.network.timestep(sigma)

    def _spread(self, sigma: Tensor) -> Tensor:
        return self._scaled(sigma) ** 2 + LCM_SIGMA_DATA**2


class ClippedConsistencyModel(ConsistencyModel):
    """f(x, sigma) as `CMStochasticIterativeScheduler` computes it, to sample from.

    Its time is large, and rounded to float32 once, from float64.
    """

    def __init__(
        self, network: LevelUnet, sigma_data: float, sigma_min: float, clip: float | None
    ) -> None:
        super().__init__(network, sigma_data, sigma_min)
        self.clip = clip

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x float [N, ...] and sigma float64 [N], not below eps, to float [N, ...]."""
        c_in = 1 / (sigma**2 + self.sigma_data**2).sqrt()
        c_skip = self.sigma_data**2 / ((sigma - self.sigma_min) ** 2 + self.sigma_data**2)
        output = self.network(each(c_in, x) * x, sigma.double().log() / 4)
        return clipped(each(c_skip, x) * x + each(self.c_out(sigma), x) * output, self.clip)


def clipped(x: Tensor, bound: float | None) -> Tensor:
    """x within [-bound, bound]."""
    return x if bound is None else x.clamp(-bound, bound)
