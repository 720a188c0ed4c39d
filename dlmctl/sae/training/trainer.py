"""Training of one autoencoder on batches of activations.

The recipe is that of Gao et al. (2024, arXiv 2406.04093) as DLM-Scope (arXiv 2602.05859) has it:
Adam, warm-up, a linear decay over the last fifth, gradients clipped, the part of the decoder's
gradient along a row taken out and its rows brought back to norm 1 after every step. Activations are
divided by the root of their mean squared norm, which is folded back into the weights that are
saved, so that those take activations as they come.

BatchTopK and Matryoshka autoencoders are saved with a threshold in place of K, as in
dictionary_learning: the exponential mean of each batch's smallest active latent, with beta 0.999
from step 1000 on. In runs of fewer than 10,000 steps it begins after a tenth of them and reaches as
far back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.formats.folders import SavedSae
from dlmctl.sae.measures import CONSTANT
from dlmctl.sae.topk import JumpReluSae, TopKSae
from dlmctl.sae.training.gradient import Choice, Decoded, SaeWeights, add_gradient, choose
from dlmctl.settings.sae import SaeKind, SaeRecipe
from dlmctl.train.optimizer import (
    apply_step,
    learning_rate,
    optimizer_state,
    restore_optimizer,
)

MEDIAN_SAMPLE = 32_768
"""Activations of which the first centre is the geometric median."""
THRESHOLD_STEPS = 1000
"""Steps until the mean of the threshold begins, and 1 / (1 - beta)."""


def rate_at(recipe: SaeRecipe, step: int) -> float:
    """Learning rate of step 0, 1, …"""
    warmup, decay_from = min(recipe.warmup, recipe.steps // 10), recipe.decay_from * recipe.steps
    return learning_rate(step, recipe.rate, warmup, "linear", recipe.steps, round(decay_from))


class SaeTrainer:
    """An autoencoder under training."""

    SCALARS = ("scale", "step", "counted")
    """Attributes that a state contains, besides tensors of the features and of the optimizer."""

    def __init__(
        self, recipe: SaeRecipe, d_in: int, k: int, seed: int, device: torch.device | str
    ) -> None:
        self.recipe, self.k, self.seed = recipe, k, seed
        self.sae = SaeWeights(d_in, recipe.latents).to(device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), betas=(0.9, 0.999), fused=True)
        self.scale = 1.0
        """Root of the mean squared norm of the activations."""
        self.step = 0
        self.unused = torch.zeros(recipe.latents, dtype=torch.int64, device=device)
        """[F], activations since a latent was last active."""
        self.active = torch.zeros_like(self.unused)
        """[F], activations in which it was active since the rate began to fall."""
        self.counted = 0
        """Activations in which that was counted."""
        self.threshold = torch.zeros((), device=device)
        """Pre-activation above which a latent is active outside training; not of `topk`."""

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.steps

    @property
    def tokens(self) -> int:
        """Activations trained on."""
        return self.step * self.recipe.batch_size

    @property
    def dead(self) -> Tensor:
        """bool [F]."""
        return self.unused >= self.recipe.dead_limit

    @torch.no_grad()
    def begin(self, x: Tensor) -> None:
        """First weights, from a sample of the activations [N, d].

        The centre is their geometric median, the decoder random directions, the encoder the same
        but for its length: directions are not orthogonal, so that of K codes of full length each
        counts what the others have counted (Gao et al. 2024, appendix A.1). The published code
        leaves it at that.
        """
        x = x.to(self.sae.centre.dtype)
        self.scale = max(float(x.square().sum(dim=1).mean().sqrt()), 1e-12)
        generator = torch.Generator().manual_seed(self.seed)
        directions = torch.randn(self.sae.decoder.shape, generator=generator)
        self.sae.decoder.copy_(functional.normalize(directions, dim=1))
        self.sae.encoder.copy_(self.sae.decoder)
        self.sae.centre.copy_(geometric_median(x[:MEDIAN_SAMPLE] / self.scale))
        if self.recipe.fitted_encoder:
            centred = x[: self.recipe.batch_size] / self.scale - self.sae.centre
            self.sae.encoder *= best_length(
                self.sae, centred, self.recipe.k_at(0, self.k), self.recipe.kind
            )

    def train_step(self, x: Tensor, measured: bool = True) -> dict[str, Any]:
        """One step on activations [N, d]; returns its metrics, or nothing where not `measured`."""
        recipe, sae = self.recipe, self.sae
        x = x.to(sae.centre.dtype) / self.scale
        dead = self.dead.nonzero().flatten()
        low = x.device.type == "cuda"
        with torch.autocast(x.device.type, torch.bfloat16, enabled=low):
            outcome = add_gradient(
                sae,
                x,
                recipe.k_at(self.step, self.k),
                dead,
                max(1, x.shape[1] // 2),
                recipe.aux_weight,
                recipe.aux,
                recipe.kind,
                recipe.prefix_ends,
            )
        codes = outcome.codes
        if recipe.kind != "topk":
            self._track_threshold(codes)
        l0 = self._mean_active(x, codes) if measured else None
        remove_parallel(sae)
        rate = rate_at(recipe, self.step)
        norm, applied = apply_step(self.optimizer, sae.parameters(), rate, recipe.max_norm)
        with torch.no_grad():
            sae.decoder /= sae.decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self._count(codes, len(x))
        self.step += 1
        if not measured:
            return {}
        return {
            "step": self.step,
            "tokens": self.tokens,
            **fit(x, outcome.residual),
            "aux": float(outcome.auxiliary),
            "l0": l0,
            "dead": int(self.dead.sum()),
            "lr": rate,
            "grad_norm": norm,
            "applied": applied,
        }

    @torch.no_grad()
    def _track_threshold(self, codes: Choice) -> None:
        """Move the threshold towards the smallest active latent of a batch, if there is one."""
        lowest = codes.values.where(codes.active, torch.inf).amin()
        span = max(1, min(THRESHOLD_STEPS, self.recipe.steps // 10))
        beta = 1 - 1 / span if self.step > span else 0.0
        moved = beta * self.threshold + (1 - beta) * lowest
        self.threshold = moved.where(lowest.isfinite(), self.threshold)

    @torch.no_grad()
    def _mean_active(self, x: Tensor, codes: Choice) -> float:
        """Mean number of active latents of scaled activations, at the threshold if there is one."""
        active = codes.active
        if self.recipe.kind != "topk":
            sae = self.sae
            active = functional.linear(x - sae.centre, sae.encoder, sae.bias) > self.threshold
        return int(active.sum()) / len(x)

    def _count(self, codes: Choice, count: int) -> None:
        """Which latents were active in this step of `count` activations."""
        found = torch.zeros_like(self.unused)
        found.index_add_(0, codes.latents, codes.active.long())  # [F]
        self.unused.add_(count).masked_fill_(found > 0, 0)
        if self.step >= self.recipe.decay_from * self.recipe.steps:
            self.active += found
            self.counted += count

    @torch.no_grad()
    def saved(self, metadata: Mapping[str, Any]) -> SavedSae:
        """What has been learnt, the scale folded into it."""
        sae = empty_sae(self.recipe, self.sae.centre.numel(), self.k)
        if isinstance(sae, JumpReluSae):
            sae.threshold.copy_(self.threshold * self.scale)
        sae.W_enc.copy_(self.sae.encoder.T)
        sae.b_enc.copy_(self.sae.bias * self.scale)
        sae.W_dec.copy_(self.sae.decoder)
        sae.b_dec.copy_(self.sae.centre * self.scale)
        rates = (self.active / self.counted).float().cpu() if self.counted else None
        return SavedSae(sae, metadata, rates)

    def _tensors(self) -> dict[str, Tensor]:
        return {"unused": self.unused, "active": self.active, "threshold": self.threshold}

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, on the CPU."""
        parameters = dict(self.sae.named_parameters())
        numbers = {n: torch.tensor(getattr(self, n), dtype=torch.float64) for n in self.SCALARS}
        tensors = {**self._tensors(), **numbers, **parameters}
        tensors |= optimizer_state(self.optimizer, parameters)
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a state."""
        parameters = dict(self.sae.named_parameters())
        tensors = {**self._tensors(), **parameters}
        for name, tensor in tensors.items():
            tensor.copy_(state[name])
        for name in self.SCALARS:
            setattr(self, name, type(getattr(self, name))(state[name]))
        restore_optimizer(self.optimizer, parameters, state)


def empty_sae(recipe: SaeRecipe, d_in: int, k: int) -> TopKSae:
    """An autoencoder of the kind that is saved, all zeros."""
    kind = TopKSae if recipe.kind == "topk" else JumpReluSae
    return kind(d_in, recipe.latents, k)


@torch.no_grad()
def best_length(sae: SaeWeights, centred: Tensor, k: int, kind: SaeKind) -> float:
    """Factor of the encoder with which the first codes explain most, by least squares."""
    made = Decoded(choose(centred @ sae.encoder.T, k, kind), sae.decoder).rows
    factor = float((made * centred).sum() / made.square().sum().clamp(min=1e-30))
    return factor if factor > 0 else 1.0


@torch.no_grad()
def remove_parallel(sae: SaeWeights) -> None:
    """Take out of the decoder's gradient what would only change the norm of its rows."""
    gradient = sae.decoder.grad
    assert gradient is not None
    along = (gradient * sae.decoder).sum(dim=1, keepdim=True)
    gradient.addcmul_(along, sae.decoder, value=-1)


def fit(x: Tensor, residual: Tensor) -> dict[str, float | None]:
    """Mean squared error, and how much of the variance is explained, by both definitions.

    `fve` subtracts the mean of the residual, as the published figures do, and so forgives a
    constant error; `fvu` = |residual|^2 / |x - mean|^2 does not. Both are None of a batch without
    variance.
    """
    squared, about = residual.square().sum(), float((x - x.mean(dim=0)).square().sum())
    found: dict[str, float | None] = {"l2": float(squared) / len(x), "fve": None, "fvu": None}
    if about > CONSTANT**2 * float(x.square().sum()):
        varied = (residual - residual.mean(dim=0)).square().sum()
        found |= {"fve": 1 - float(varied) / about, "fvu": float(squared) / about}
    return found


def geometric_median(x: Tensor, rounds: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point [d] with the least sum of distances to points [N, d], by Weiszfeld's iteration."""
    guess = x.mean(dim=0)
    for _ in range(rounds):
        weights = 1 / (x - guess).norm(dim=1).clamp(min=1e-8)
        following = (weights[:, None] * x).sum(dim=0) / weights.sum()
        moved = float((following - guess).norm())
        guess = following
        if moved <= tolerance * max(1.0, math.sqrt(float(guess.square().sum()))):
            break
    return guess
