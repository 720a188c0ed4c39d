"""Samples of a teacher or a student, from noise that depends only on the seed and the sample.

Sample i starts from the same noise whatever the model, its number of steps, the batch size and the
number of samples, so that teacher and student can be compared sample by sample.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, subkeys, uniform
from dlmctl.distill.consistency_model import sample_steps
from dlmctl.distill.diffusers_models import sampler_levels
from dlmctl.distill.diffusers_networks import DiffusersConfig
from dlmctl.distill.edm import noise_grid, solve
from dlmctl.distill.image_checkpoints import ImageModel
from dlmctl.records.errors import UsageError
from dlmctl.settings.distill import Solver


def sample_noise(seed: int, samples: range, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Standard normal noise of these samples, float32 [N, *shape].

    A function of the seed, the number of the sample and the step. Step 0 is the start; later steps
    are those of a student that samples in several.
    """
    base = key_tensor([stream_key(seed, "continuous", step)])
    keys = subkeys(base, torch.tensor(list(samples), dtype=torch.int64))
    counters = torch.arange(math.prod(shape), dtype=torch.int64)
    normal = torch.special.ndtri(uniform(keys[:, None], counters))
    return normal.float().view(-1, *shape)


def levels(model: ImageModel, steps: int) -> Tensor:
    """The noise levels that a sampler visits in `steps` steps, float64 [steps].

    A teacher's are EDM's grid, from sigma_max to sigma_min. A student's are the grid with one more
    point, without its end, at which a student is the identity (ours): sigma_max alone for one step.
    One with a scheduler of diffusers has the levels of that scheduler.

    Raises:
        UsageError: its scheduler cannot take this number of steps.
    """
    if model.kind == "consistency":
        network = model.config.network if model.config else None
        if isinstance(network, DiffusersConfig):
            chosen = sampler_levels(network, steps)
            if chosen is not None:
                return chosen
        return noise_grid(model.noise, steps + 1)[:-1]
    return noise_grid(model.noise, steps)


def student_levels(model: ImageModel, given: Sequence[float]) -> Tensor:
    """Levels that a student is to visit in place of those of `levels`, float64 [steps].

    Raises:
        UsageError: they do not fall, or are not within the student's.
    """
    known, fall = model.noise, all(a > b for a, b in itertools.pairwise(given))
    if not fall or not known.sigma_min < given[-1] <= given[0] <= known.sigma_max:
        raise UsageError(
            f"--levels {','.join(f'{level:g}' for level in given)} do not fall from at most "
            f"{known.sigma_max:g} to more than {known.sigma_min:g}, between which {model.name} maps"
        )
    return torch.tensor(given, dtype=torch.float64)


def draw(
    model: ImageModel,
    count: int,
    seed: int,
    sigmas: Tensor,
    solver: Solver = "heun",
    batch_size: int = 256,
    advance: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """Samples, float32 [count, *shape] on the CPU, or the images that they are latents of.

    A denoiser follows the ODE down to 0. Latents are decoded. Models of a discrete process begin
    at noise of variance 1 + sigma^2, which is N(0, I) in their own coordinates.

    Args:
        sigmas: float64 [steps], the levels that are visited.
        advance: called with the number of samples of each finished batch.
    """
    samples = []
    for first in range(0, count, batch_size):
        batch = range(first, min(count, first + batch_size))
        function = model.conditioned(batch) if model.conditioned else model.function
        scale, ends = sigmas[0].item(), model.noise.sigma_min
        if model.discrete:
            scale, ends = math.sqrt(1 + scale**2), 0.0
        x = scale * sample_noise(seed, batch, model.shape).to(model.device)
        if model.kind == "consistency":

            def fresh(step: int, batch: range = batch) -> Tensor:
                return sample_noise(seed, batch, model.shape, step).to(model.device)

            x = sample_steps(function, x, sigmas, ends, fresh)
        else:
            x = solve(function, x, sigmas, solver)
        if model.autoencoder:
            x = model.autoencoder.decode(x)
        samples.append(x.cpu())
        advance(len(batch))
    return torch.cat(samples)


def evaluations(model: ImageModel, steps: int, solver: Solver) -> int:
    """How often a sampler evaluates the model for one sample in `steps` steps.

    That of a teacher of texts counts for two, one with the text and one without.
    """
    if model.kind == "consistency":
        return steps
    count = steps if solver == "euler" else 2 * steps - 1
    return 2 * count if model.conditioned else count
