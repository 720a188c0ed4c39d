"""What a student keeps of its teacher's map, by directions of the teacher's features:

    python directions.py TEACHER STUDENT IMAGES UNSEEN SIGMA

`memo-eval theory` asks this of random features. Here the features phi are the input of the
teacher's last layer, for images with noise of this level, and a direction q is an eigenvector of
their covariance, with variance lambda. kappa = E[(q . (phi(y_s) - phi(x_t)))^2] / lambda says how
unstable q is in a step of the teacher's ODE. The student is compared with the teacher's exact map
to the beginning of its ODE. Both are F in f = c_skip x + c_out F.

Eight rows have a group of directions each, the stable ones first: `kept` is the student's part
along the exact map's, `power` the share of the exact map that is in the group, and `memorized` how
much more the squared error of the teacher's denoised images grows for images trained on than for
unseen ones if the group is left out. The row `rest` has what is not linear in phi.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from torch import Tensor

from dlmctl.distill.edm import noise_grid, ode_step, solve
from dlmctl.distill.image_checkpoints import ImageModel, load_model
from dlmctl.distill.image_sets import read_images
from dlmctl.settings.images import ImageReading

POINTS = 18
"""Levels of the student's grid, and of the solver that finds the exact map."""
SAMPLES = 32768
GROUPS = 8


def features(model: ImageModel, x: Tensor, sigma: Tensor) -> Tensor:
    """Input of the last layer, float64 [N, p]."""
    seen: list[Tensor] = []
    network: Any = model.network
    hook = network.last.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.function(x, sigma)
    hook.remove()
    return seen[0].double()


def noisy(images: Tensor, sigma: float, seed: int) -> tuple[Tensor, Tensor]:
    """Images, and the same with noise, float32 [N, ...]."""
    clean = images[torch.arange(SAMPLES) % len(images)]
    draws = torch.Generator().manual_seed(seed)
    return clean, clean + sigma * torch.randn(clean.shape, generator=draws)


class Directions:
    """Directions of a teacher's features at one level."""

    def __init__(self, teacher: ImageModel, x: Tensor, level: Tensor) -> None:
        self.teacher, self.level = teacher, level
        phi = features(teacher, x, level)
        self.mean = phi.mean(0)
        centred = phi - self.mean
        self.values, self.vectors = torch.linalg.eigh(centred.T @ centred / len(phi))
        self.z = centred @ self.vectors  # [N, p]

    def instability(self, x: Tensor, to: Tensor) -> Tensor:
        """kappa, [p], of a step of the ODE."""
        end = ode_step(self.teacher.function, x, self.level, to)
        moved = (features(self.teacher, end, to) - self.mean) @ self.vectors - self.z
        return moved.square().mean(0) / self.values

    def divided(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients [p, d] of outputs [N, d] on the directions, and the rest [N, d]."""
        centred = outputs - outputs.mean(0)
        coefficients = self.z.T @ centred / len(centred) / self.values[:, None]
        return coefficients, centred - self.z @ coefficients

    def errors_without(self, clean: Tensor, x: Tensor) -> Tensor:
        """How much the squared error of denoised images grows without each direction, [p]."""
        teacher: Any = self.teacher
        away = (teacher.function(x, self.level) - clean).flatten(1).double()
        z = (features(teacher, x, self.level) - self.mean) @ self.vectors
        total = self.level**2 + teacher.function.sigma_data**2
        z = z * (self.level * teacher.function.sigma_data / total.sqrt())[:, None]
        own = teacher.network.last.weight.double() @ self.vectors  # [d, p]
        return z.square().mean(0) * own.square().sum(0) - 2 * (z * (away @ own)).mean(0)


@torch.no_grad()
def rows(teacher: ImageModel, student: ImageModel, seen: Tensor, unseen: Tensor, asked: float):
    """A record for each group, and one for the rest."""
    grid = noise_grid(student.noise, POINTS)
    at = int((grid - asked).abs().argmin())
    level, to = (grid[n].expand(SAMPLES) for n in (at, at + 1))
    clean, x = noisy(seen, float(grid[at]), 1)
    directions = Directions(teacher, x, level)

    model: Any = student.function
    beginning = noise_grid(dataclasses.replace(teacher.noise, sigma_max=float(grid[at])), POINTS)
    exact = solve(teacher.function, x, beginning, to_zero=False)
    skip = model.sigma_data**2 / ((grid[at] - model.sigma_min) ** 2 + model.sigma_data**2)
    whole, kept = (
        directions.divided((f.double() - skip * x).flatten(1) / model.c_out(grid[at]))
        for f in (exact, model(x, level))
    )
    power = whole[0].square().sum(1) * directions.values
    along = (whole[0] * kept[0]).sum(1) * directions.values
    rest, rest_along = whole[1].square().sum(1).mean(), (whole[1] * kept[1]).sum(1).mean()
    memorized = directions.errors_without(clean, x) - directions.errors_without(
        *noisy(unseen, float(grid[at]), 2)
    )
    kappa = directions.instability(x, to)
    about = {"sigma": float(grid[at])}
    for number, part in enumerate(kappa.argsort().chunk(GROUPS), 1):
        yield about | {
            "group": number,
            "kappa": float(kappa[part].median()),
            "kept": float(along[part].sum() / power[part].sum()),
            "power": float(power[part].sum() / (power.sum() + rest)),
            "memorized": float(memorized[part].sum()),
        }
    yield about | {
        "group": "rest",
        "kept": float(rest_along / rest),
        "power": float(rest / (power.sum() + rest)),
    }


teacher_name, student_name, *sources, sigma = sys.argv[1:]
images = (read_images(source, ImageReading()) for source in sources)
for row in rows(load_model(teacher_name), load_model(student_name), *images, float(sigma)):
    print(json.dumps(row))
