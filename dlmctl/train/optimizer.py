"""AdamW with gradient clipping and warm-up, and a step that is left out when it is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from dlmctl.settings.optimizer import Optimizer, Schedule
from dlmctl.train.sharding import full_tensor


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name, in the order of the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(parameters: Iterable[nn.Parameter], settings: Optimizer) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (norms, biases) do not. The rate is set at every step."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() > 1 else vectors).append(parameter)
    kinds = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    kinds = [kind for kind in kinds if kind["params"]]
    return torch.optim.AdamW(kinds, lr=0.0, betas=(settings.beta1, settings.beta2))


def learning_rate(
    step: int, peak: float, warmup: int, schedule: Schedule = "constant", total: int | None = None
) -> float:
    """Rate of step 0, 1, …: linear warm-up, then constant, or a cosine to 0 at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant" or not total:
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def apply_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    rate: float,
    max_norm: float,
) -> tuple[float, bool]:
    """Clip the gradients, step, and clear them.

    Returns:
        The gradient norm before clipping, and whether the step was applied; a step whose norm is
        not finite is not.
    """
    parameters = list(parameters)
    clipped = nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)
    norm = float(full_tensor(clipped))
    finite = math.isfinite(norm)
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm, finite
