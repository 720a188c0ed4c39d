"""The random-feature model, whose memorization and distillation are computed in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, same
from dlmctl.settings.compute import Seed
from dlmctl.settings.parsing import float_grid

MODEL, TRAINING = "Model", "Training"
BULKS = ("gen", "mem", "null")
"""Groups of eigen-directions, by falling eigenvalue: d that generalize, then those that memorize,
up to n or p, and p - n that change neither loss if p is larger than n."""


def noise_variance(time: float) -> float:
    """D = 1 - e^-2t."""
    return -math.expm1(-2 * time)


@dataclass(frozen=True)
class FeatureModel:
    """Sizes, diffusion time and data of the random-feature model."""

    PANEL: ClassVar[str] = MODEL

    psi_n: float = knob(6, "Samples per dimension, n/d; above 1.")
    psi_p: float = knob(
        24,
        "Features per dimension, p/d; above 1. With fewer features than samples there is no null "
        "bulk, and the network is too small to memorize all of its training set.",
    )
    dimension: int = knob(
        50,
        "Dimension d of the data; the work grows as (p/d x d)^3.",
        "-d",
        "--dimension",
        minimum=2,
    )
    time: float = knob(0.05, "Diffusion time at which the score is learned.", "-t", "--time")
    variances: str = knob(
        "1", "Eigenvalues of the data's covariance, in equal shares: 0.5,1.5.", metavar="LIST"
    )

    def __post_init__(self) -> None:
        if not self.dimension < min(self.samples, self.features):
            raise UsageError(
                f"--psi-n {self.psi_n:g} and --psi-p {self.psi_p:g}: "
                "there is a bulk that memorizes only if both are above 1"
            )
        if not 0 < self.time < math.inf:
            raise UsageError(f"--time {self.time:g} is not a number above 0")
        if min(self.eigenvalues) <= 0 or self.dimension < 2 * len(self.eigenvalues):
            raise UsageError(
                "--variances are positive numbers, at most one for every two of the --dimension"
            )

    @cached_property
    def eigenvalues(self) -> list[float]:
        """Eigenvalues of Sigma, in equal shares."""
        return float_grid("--variances", self.variances)

    @property
    def samples(self) -> int:
        """n."""
        return round(self.psi_n * self.dimension)

    @property
    def features(self) -> int:
        """p."""
        return round(self.psi_p * self.dimension)

    @property
    def noise(self) -> float:
        """D, the variance of the noise."""
        return noise_variance(self.time)

    @property
    def data_variance(self) -> float:
        """trace(Sigma) / d."""
        return sum(self.eigenvalues) / len(self.eigenvalues)

    def bulks(self) -> dict[str, slice]:
        """Ranks of the eigenvalues of each bulk, the largest first; null only if p > n."""
        d, p = self.dimension, self.features
        memorized = min(self.samples, p)
        ends = (0, d, memorized, p) if p > memorized else (0, d, p)
        return dict(zip(BULKS, map(slice, ends[:-1], ends[1:]), strict=False))


@dataclass(frozen=True)
class FeatureTraining:
    """How teachers and students of the random-feature model are trained."""

    delta: float = knob(
        0.04, "Length of the teacher's step in distillation; below --time.", panel=TRAINING
    )
    teacher_tau: list[str] | None = knob(
        None,
        "Training times of the teachers that students are distilled from; repeatable.",
        metavar="LIST",
        shown_default="1e4",
        panel=TRAINING,
    )
    taus: str = knob(
        "1:1e8:33",
        "Training times of the rows: numbers, or LOW:HIGH:COUNT, evenly spaced in the logarithm.",
        metavar="LIST",
        panel=TRAINING,
    )
    student_init: Literal["teacher", "zero"] = knob(
        "teacher", "Initial weights of a student.", panel=TRAINING
    )
    lr: float | None = knob(
        None,
        "Train teachers by gradient descent with this learning rate; --taus are rounded to its "
        "steps.",
        shown_default="gradient flow",
        panel=TRAINING,
    )
    draws: int = knob(
        0,
        "Learn from this many fixed draws of the noise per sample; 0 learns from all noise, "
        "exactly. Losses are always under all noise.",
        minimum=0,
        panel=TRAINING,
    )
    noise_draws: int | None = knob(
        None,
        "Draws of the noise per sample for the part of the student that is not exact. Not with "
        "--draws, which the student uses too.",
        minimum=1,
        shown_default="20 p/n",
        panel=TRAINING,
    )
    seed: int = same(0, Seed)

    def __post_init__(self) -> None:
        if min(*self.times, *self.teacher_times) < 0:
            raise UsageError("--taus and --teacher-tau are times, which are not below 0")
        if self.lr is not None and self.lr <= 0:
            raise UsageError(f"--lr {self.lr:g} is not above 0")
        if self.noise_draws and self.draws:
            raise UsageError("--noise-draws are for students of all noise: not with --draws")

    @cached_property
    def times(self) -> list[float]:
        """Training times of the rows."""
        return float_grid("--taus", self.taus)

    @cached_property
    def teacher_times(self) -> list[float]:
        """Training times of the teachers that students are distilled from."""
        texts = self.teacher_tau or ["1e4"]
        return [time for text in texts for time in float_grid("--teacher-tau", text)]
