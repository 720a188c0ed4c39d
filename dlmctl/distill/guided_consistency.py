"""Latent consistency distillation with guidance as an input (Luo et al., arXiv 2310.04378).

A teacher of latents x given a text c is followed under classifier-free guidance of strength w,

    D_w(x, sigma) = D(x, sigma; c) + w (D(x, sigma; c) - D(x, sigma; none))        w = scale - 1

and the student f(x, sigma; c, w), which takes w as a further embedding, learns where it leads. With
timesteps t_i = i k - 1, k = T / N, i = 1, …, N, a step of DDIM, which is an Euler step of EDM's
ODE, leads from t_i to s = max(t_i - k, 0), and

    L = mean over elements of loss(f(x_t, t; c, w) - f'(x_s, s; c, w))

with the target f' an average of the student, w uniform in a range, and loss(d) = d^2, or
sqrt(d^2 + h^2) - h. f has the form of `diffusers_networks`; scale is `guidance_scale` of diffusers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dlmctl.distill.consistency_model import cd_pair
from dlmctl.distill.diffusers_networks import (
    DiscreteUnet,
    LatentConsistencyModel,
    Prediction,
)
from dlmctl.distill.edm import EVERY, Denoiser, each
from dlmctl.settings.distill import GuidedDistillation


class Conditioned(nn.Module):
    """A `UNet2DConditionModel` with its text, and the embedding of w if it takes one."""

    def __init__(self, unet: nn.Module, text: Tensor, strength: Tensor | None = None) -> None:
        """Bind a text for each row.

        Args:
            text: states of the text encoder, float [N, L, E].
            strength: w, float [N], for a student.
        """
        super().__init__()
        self.unet, self.text = unet, text
        self.embedded = None
        if strength is not None:
            self.embedded = strength_embedding(strength, unet.config.time_cond_proj_dim)

    def forward(self, x: Tensor, time: Tensor, return_dict: bool = False) -> tuple[Tensor, ...]:
        """Float [N, C, H, W] and float [N]; float [N, C, H, W] in a tuple."""
        embedded = None if self.embedded is None else self.embedded.to(x)
        text = self.text.to(x)
        output: tuple[Tensor, ...] = self.unet(
            x, time, encoder_hidden_states=text, timestep_cond=embedded, return_dict=False
        )
        return output


def strength_embedding(strength: Tensor, size: int) -> Tensor:
    """Sines and cosines of 1000 w, float [N] to float32 [N, size], as diffusers' pipeline has them.

    The frequencies fall geometrically from 1 to 1e-4; an odd size ends with 0.
    """
    half = size // 2
    # In float32 from the beginning: at 1000 w another rounding of a frequency is another angle.
    step = torch.tensor(10000.0).log() / (half - 1)
    frequencies = (torch.arange(half, dtype=torch.float32) * -step).exp()
    angles = 1000 * strength.float()[:, None] * frequencies.to(strength.device)
    embedded = torch.cat([angles.sin(), angles.cos()], 1)
    return nn.functional.pad(embedded, (0, size % 2))


def guided(conditional: Denoiser, unconditional: Denoiser, strength: Tensor) -> Denoiser:
    """D_w of these denoisers and w, float [N]."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        with_text, without = conditional(x, sigma), unconditional(x, sigma)
        return with_text + each(strength, x) * (with_text - without)

    return denoise


class GuidedTeacher(nn.Module):
    """A teacher's network and the process that it was trained on."""

    table: Tensor
    empty: Tensor

    def __init__(
        self, unet: nn.Module, table: Tensor, prediction: Prediction, empty: Tensor
    ) -> None:
        """Bind the states of the empty text, float [L, E]."""
        super().__init__()
        self.unet, self.prediction = unet, prediction
        self.register_buffer("table", table, persistent=False)
        self.register_buffer("empty", empty, persistent=False)

    def denoiser(self, text: Tensor, strength: Tensor) -> Denoiser:
        """D_w given texts, float [N, L, E], and w, float [N]."""
        conditional, unconditional = (
            DiscreteUnet(Conditioned(self.unet, states), self.table, self.prediction).denoise
            for states in (text, self.empty.expand_as(text))
        )
        return guided(conditional, unconditional, strength)

    def student(
        self, unet: nn.Module, text: Tensor, strength: Tensor, scaling: float = 10.0
    ) -> LatentConsistencyModel:
        """f given texts and w, of a student of this process."""
        network = DiscreteUnet(Conditioned(unet, text, strength), self.table, self.prediction)
        return LatentConsistencyModel(network, math.exp(float(self.table[0])), scaling)


def guided_loss(
    plan: GuidedDistillation,
    teacher: GuidedTeacher,
    unet: nn.Module,
    target: nn.Module,
    latents: Tensor,
    text: Tensor,
    generator: torch.Generator,
    own: slice = EVERY,
) -> Tensor:
    """The mean loss of a batch.

    Args:
        unet, target: networks of the student and of its target.
        latents: float [N, C, H, W].
        text: float [N, L, E].
        generator: on the CPU; timesteps, w and noise are drawn for the whole batch.
        own: rows of the batch, at least one, whose part of the mean is returned.
    """
    count, sigmas = len(latents), teacher.table.exp()
    skipped = len(sigmas) // plan.ddim_steps
    start = skipped * torch.randint(1, plan.ddim_steps + 1, (count,), generator=generator) - 1
    low, high = plan.guidance_min - 1, plan.guidance_max - 1
    strength = low + (high - low) * torch.rand(count, generator=generator)
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    start, strength = start.to(latents.device), strength.to(latents)
    latents, text, noise, start, strength = (
        rows[own] for rows in (latents, text, noise, start, strength)
    )
    sigma, to = sigmas[start], sigmas[(start - skipped).clamp_min(0)]
    pair = cd_pair(teacher.denoiser(text, strength), latents, noise, sigma, to, "euler")
    with torch.no_grad():
        goal = teacher.student(target, text, strength)(pair.to_x, to)
    error = teacher.student(unet, text, strength)(pair.x, sigma) - goal
    square = error.square()
    if plan.metric == "huber":
        square = (square + plan.huber**2).sqrt() - plan.huber
    return square.mean() * (len(latents) / count)
