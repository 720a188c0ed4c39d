"""A training step of a Top-K autoencoder as it is commonly written, for comparison.

Codes are dense, [N, F], and automatic differentiation computes the gradient. Loss, schedule,
clipping and the norm of the decoder's rows are those of `SaeTrainer`.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from dlmctl.sae.training.trainer import SaeTrainer, rate_at, remove_parallel
from dlmctl.train.optimizer import apply_step


class DenseTrainer:
    """Starts from the weights that a trainer of this package has before its first step."""

    def __init__(self, trainer: SaeTrainer) -> None:
        self.recipe, self.k, self.scale = trainer.recipe, trainer.k, trainer.scale
        self.sae = copy.deepcopy(trainer.sae)
        self.optimizer = torch.optim.Adam(self.sae.parameters())
        self.unused = trainer.unused.clone()
        self.step = 0

    def train_step(self, x: Tensor) -> float:
        """One step on activations [N, d]; returns L_rec."""
        recipe, sae = self.recipe, self.sae
        x = x.to(sae.centre.dtype) / self.scale
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            pre = (x - sae.centre) @ sae.encoder.T + sae.bias
            codes = _largest(pre, recipe.k_at(self.step, self.k)).relu()
            reconstruction = codes @ sae.decoder + sae.centre
            loss = (reconstruction - x).square().sum(dim=1).mean()
            target = x - sae.centre if recipe.aux == "input" else x - reconstruction
            auxiliary = self._auxiliary(x, pre, target.detach())
            total = loss + recipe.aux_weight * auxiliary
        total.backward()
        remove_parallel(sae)
        rate = rate_at(recipe, self.step)
        apply_step(self.optimizer, sae.parameters(), rate, recipe.max_norm)
        with torch.no_grad():
            sae.decoder /= sae.decoder.norm(dim=1, keepdim=True).clamp(min=1e-12)
        self.unused += len(x)
        self.unused[(codes > 0).any(dim=0)] = 0
        self.step += 1
        return float(loss.detach())

    def _auxiliary(self, x: Tensor, pre: Tensor, target: Tensor) -> Tensor:
        sae, aux = self.sae, self.recipe.aux
        dead = self.unused >= self.recipe.dead_after
        most = self.recipe.k_at(self.step, self.k) if aux == "input" else max(1, x.shape[1] // 2)
        number = min(most, int(dead.sum()))
        if not number:
            return target.new_zeros(())
        if aux in ("straight", "input"):
            pre = (x - sae.centre.detach()) @ sae.encoder.T + sae.bias
        values = _largest(pre.masked_fill(~dead, -torch.inf), number)
        if aux == "rectified":
            values = values.relu()
        elif aux != "pre":
            values = values + (values.relu() - values).detach()
        spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
        return (values @ sae.decoder - target).square().sum(dim=1).mean() / spread


def _largest(pre: Tensor, k: int) -> Tensor:
    """The k largest values of each row, and 0 elsewhere."""
    values, places = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, places, values)
