"""Samples of a student that makes no error, to see what a measure says of them:

    python controls.py TEACHER COUNT STEPS FILE.safetensors

It is the teacher's own map from a point of its ODE to the beginning, solved in 18 steps of Heun's
method each time, and sampled in STEPS as a student is.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from torch import Tensor

from dlmctl.distill.edm import noise_grid, solve
from dlmctl.distill.image_checkpoints import load_model
from dlmctl.distill.image_sampling import draw, levels
from dlmctl.distill.image_sets import write_images

SEED = 7
"""That of the other samples of the study."""
POINTS = 18


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


teacher, count, steps, file = sys.argv[1:]
about = {"model": "exact", "evaluations": steps}
write_images(Path(file), of_exact_map(teacher, int(count), int(steps)), about)
