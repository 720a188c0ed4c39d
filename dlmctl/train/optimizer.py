"""Optimizers: learning rates, clipped steps that are skipped if not finite, and saved moments.

AdamW with moments in 8 bits is that of bitsandbytes. Each moment is a float32 scale for 256 values,
and for each value the nearest of the 256 numbers of a map (arXiv 2110.02861).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dlmctl.models.quantization import bitsandbytes
from dlmctl.settings.optimizer import Method, Optimizer, Schedule
from dlmctl.train.sharding import full_tensor, like

BLOCK, SMALLEST = 256, 4096
"""Values that share a scale, and the number of values from which moments are in 8 bits."""

MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}
"""The maps in the state of a parameter, which are the same for all, and their names."""


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that take gradients, by name, in the order of the model."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimizer(
    parameters: Iterable[nn.Parameter], settings: Optimizer, fused: bool | None = None
) -> torch.optim.Optimizer:
    """AdamW; matrices decay, vectors (norms, biases) do not. The rate is set at every step.

    Args:
        fused: whether one kernel takes the whole step of many float32 parameters, which reads and
            writes each value once and allocates nothing; None: if all are on CUDA.

    Raises:
        UnavailableError: bitsandbytes is not installed, and the moments are to be in 8 bits.
    """
    parameters = list(parameters)
    kinds: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    kinds = [kind for kind in kinds if kind["params"]]
    common: dict[str, Any] = {"lr": 0.0, "betas": (settings.beta1, settings.beta2)}
    if settings.optimizer == "adamw":
        if fused is None:
            fused = all(parameter.is_cuda for parameter in parameters)
        # Not False, which would also leave out the kernels that take several parameters at once.
        return torch.optim.AdamW(kinds, **common, fused=fused or None)
    package = bitsandbytes(f"--optimizer {settings.optimizer}")
    made: torch.optim.Optimizer = package.optim.AdamW8bit(kinds, **common, min_8bit_size=SMALLEST)
    return made


def moment_bytes(parameter: Tensor) -> int:
    """Bytes of both moments of a parameter in 8 bits."""
    values = parameter.numel()
    if values < SMALLEST:
        return 2 * values * 4
    return 2 * (values + 4 * math.ceil(values / BLOCK))


def learning_rate(
    step: int,
    peak: float,
    warmup: int,
    schedule: Schedule | Literal["linear"] = "constant",
    total: int | None = None,
    decay_from: int | None = None,
) -> float:
    """Rate of step 0, 1, …: linear warm-up, then constant, or falling to 0 at step `total`.

    Args:
        decay_from: step from which it falls; None: the end of the warm-up.
    """
    start = warmup if decay_from is None else decay_from
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant" or not total or step < start:
        return peak
    span = max(1, total - start)
    if schedule == "linear":
        return peak * max(0.0, (total - step) / span)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - start) / span)))


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


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What the optimizer keeps of each parameter, as `optimizer.KEY.PARAMETER`; not copied."""
    return {
        f"optimizer.{key}.{name}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in MAPS
    }


def method_of(tensors: Mapping[str, Tensor]) -> Method | None:
    """The optimizer that `optimizer_state` took these from; None: from one without moments yet."""
    keys = {name.split(".")[1] for name in tensors if name.startswith("optimizer.")}
    return "adamw-8bit" if "state1" in keys else "adamw" if "exp_avg" in keys else None


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
) -> None:
    """Give the optimizer the state that `optimizer_state` took.

    Args:
        parameters: may be spread over the ranks, each of which calls this.
        tensors: whole, on the CPU; names that do not begin with `optimizer.` are ignored.
    """
    fused = bool(optimizer.defaults.get("fused"))
    maps: Mapping[str, Tensor] | None = getattr(optimizer, "name2qmap", None)
    for full_name, value in tensors.items():
        kind, _, rest = full_name.partition(".")
        key, _, name = rest.partition(".")
        if kind == "optimizer" and name in parameters:
            parameter = parameters[name]
            state = optimizer.state[parameter]
            if key == "step":
                # Counted on the CPU, unless the step is fused; never spread over the ranks.
                state[key] = value.to(parameter.device) if fused else value
            else:
                state[key] = like(value, parameter)
            if maps is None:
                continue
            if key == "step":
                state[key] = int(value)
            elif key == "state1" and value.dtype == torch.uint8:
                state |= {name: maps[which].to(parameter.device) for name, which in MAPS.items()}
