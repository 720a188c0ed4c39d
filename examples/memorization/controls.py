"""Samples of which it is known how they were made, to see what a measure tells:

    python controls.py gaussian SET COUNT FILE.safetensors
    python controls.py exact TEACHER COUNT STEPS FILE.safetensors

`gaussian` draws from a normal distribution with the mean and the covariance of the pixels of a set.
`exact` is a student that makes no error: the teacher's own map from a point of its ODE to the
beginning, solved in 18 steps of Heun's method each time, and sampled in STEPS as a student is.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch
from torch import Tensor

from dlmctl.distill.edm import noise_grid, solve
from dlmctl.distill.image_checkpoints import load_model
from dlmctl.distill.image_sampling import draw, levels, sample_noise
from dlmctl.distill.image_sets import read_images, write_images

SEED = 7
"""That of the other samples of the study."""
POINTS = 18


def of_gaussian(source: str, count: int) -> Tensor:
    """float32 [count, *shape]."""
    images = read_images(source)
    data = images.flatten(1).double()
    values, vectors = torch.linalg.eigh(data.T.cov())
    noise = sample_noise(SEED, range(count), (data.shape[1],)).double()
    drawn = data.mean(0) + noise * values.clamp_min(0).sqrt() @ vectors.T
    return drawn.float().view(-1, *images.shape[1:])


def of_exact_map(teacher: str, count: int, steps: int) -> Tensor:
    """float32 [count, *shape]."""
    model = load_model(teacher)

    def beginning(x: Tensor, sigma: Tensor) -> Tensor:
        # All samples of a batch are at the same level.
        level = float(sigma[0])
        if level <= model.noise.sigma_min:
            return x
        grid = noise_grid(dataclasses.replace(model.noise, sigma_max=level), POINTS)
        return solve(model.function, x, grid, to_zero=False)

    exact = dataclasses.replace(model, kind="consistency", function=beginning)
    return draw(exact, count, SEED, levels(exact, steps))


kind, source, count, *steps, file = sys.argv[1:]
if kind == "gaussian":
    samples = of_gaussian(source, int(count))
else:
    samples = of_exact_map(source, int(count), int(steps[0]))
about = {"model": kind, "evaluations": steps[0] if steps else "0"}
write_images(Path(file), samples, about)
