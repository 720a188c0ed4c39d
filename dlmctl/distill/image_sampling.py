"""Samples of a teacher or a student, from noise that depends on the seed and the sample alone.

Sample i begins at the same noise whatever the model, its number of steps, the batch and the number
of samples, so that teacher and student can be compared point by point.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, subkeys, uniform
from dlmctl.distill.consistency_model import sample_steps
from dlmctl.distill.edm import Solver, solve
from dlmctl.distill.image_checkpoints import Model


def gaussian(seed: int, samples: range, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Standard normal noise of these samples, float32 [N, *shape].

    A function of the seed, the number of the sample and the step: 0 is the beginning, the later
    ones are those of sampling in several steps.
    """
    base = key_tensor([stream_key(seed, "continuous", step)])
    keys = subkeys(base, torch.tensor(list(samples), dtype=torch.int64))
    counters = torch.arange(math.prod(shape), dtype=torch.int64)
    normal = torch.special.ndtri(uniform(keys[:, None], counters))
    return normal.float().view(-1, *shape)


def levels(model: Model, steps: int) -> Tensor:
    """The levels that a sampler of so many steps visits, float64 [steps].

    A teacher's are EDM's grid, from sigma_max to sigma_min. A student's are the same grid with one
    point more and without its end, where it does nothing (ours): sigma_max alone for one step.
    """
    if model.kind == "consistency":
        return model.noise.grid(steps + 1)[:-1]
    return model.noise.grid(steps)


def draw(
    model: Model,
    count: int,
    seed: int,
    steps: int,
    solver: Solver = "heun",
    batch_size: int = 256,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Samples, float32 [count, *shape] on the CPU.

    A denoiser follows the ODE down to 0 and takes 2 steps - 1 evaluations with `heun`, `steps` with
    `euler`; a consistency model takes `steps`.

    Args:
        advance: is told how many more are made.
    """
    sigmas, made = levels(model, steps), []
    for first in range(0, count, batch_size):
        batch = range(first, min(count, first + batch_size))
        x = sigmas[0].item() * gaussian(seed, batch, model.shape).to(model.device)
        if model.kind == "consistency":

            def fresh(step: int, batch: range = batch) -> Tensor:
                return gaussian(seed, batch, model.shape, step).to(model.device)

            x = sample_steps(model.function, x, sigmas, model.noise.sigma_min, fresh)
        else:
            x = solve(model.function, x, sigmas, solver)
        made.append(x.cpu())
        advance(len(batch))
    return torch.cat(made)


def evaluations(model: Model, steps: int, solver: Solver) -> int:
    """How often a sampler of so many steps evaluates the model."""
    if model.kind == "consistency" or solver == "euler":
        return steps
    return 2 * steps - 1
