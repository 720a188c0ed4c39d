"""A study of the random-feature model as records: spectrum, teachers, consistency students."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from dlmctl.memorization.theory.density import Density, density
from dlmctl.memorization.theory.flow import (
    Descent,
    Student,
    distill,
    map_error,
    teacher,
)
from dlmctl.memorization.theory.random_features import (
    BULKS,
    Problem,
    Setting,
    constants,
    draw_problem,
    losses,
    norms,
)
from dlmctl.records.errors import UsageError

DRAWS_PER_FEATURE = 20
"""Noisy samples for each feature, where the number of draws is not given."""


@dataclass(frozen=True)
class Plan:
    """What is trained, and when it is looked at."""

    taus: Sequence[float]
    teacher_taus: Sequence[float]
    """End of the training of each teacher that a student is distilled from."""
    delta: float
    from_teacher: bool = True
    """Whether a student starts as its teacher or as 0."""
    draws: int | None = None
    """Of the noise for each sample, for students of all noise; enough for `DRAWS_PER_FEATURE` by
    default."""
    fixed_draws: int = 0
    """Of the noise for each sample, from which teachers and students learn; 0 is all noise."""
    seed: int = 0
    learning_rate: float | None = None
    """Of gradient descent; gradient flow without one."""

    def __post_init__(self) -> None:
        if min(*self.taus, *self.teacher_taus, math.inf) < 0:
            raise UsageError("--taus and --teacher-tau are times, which are not below 0")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise UsageError(f"--lr {self.learning_rate:g} is not above 0")
        if self.draws and self.fixed_draws:
            raise UsageError("--noise-draws are for students of all noise: not with --draws")


class Study(NamedTuple):
    """All that takes long, done."""

    plan: Plan
    problem: Problem
    density: Density
    descent: Descent | None
    teachers: list[Tensor]
    """float64 [d, p] each, in the eigenvectors of U."""
    students: list[Student]

    def header(self) -> dict[str, Any]:
        """Constants, bulks, and what became of each student in the end."""
        setting = self.problem.setting
        return {
            "role": "theory",
            "dimension": setting.dimension,
            "samples": setting.samples,
            "features": setting.features,
            "time": setting.time,
            "variances": list(setting.variances),
            "delta": self.plan.delta,
            "draws": self.plan.fixed_draws,
            "seed": self.plan.seed,
            "constants": {**constants(setting)._asdict(), "D": setting.noise},
            "bulks": self._bulks(),
            "students": [*self._ends()],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """A record for each role and time."""
        problem = self.problem
        for tau in self.plan.taus:
            row = {"role": "teacher", "tau": tau}
            if self.descent:
                row["step"] = self.descent.steps(problem, tau)
            yield {**row, **_of_teacher(problem, teacher(problem, tau, self.descent))}
        for ended, student in zip(self.plan.teacher_taus, self.students, strict=True):
            for tau in self.plan.taus:
                row = {"role": "student", "tau": tau, "teacher_tau": ended}
                yield {**row, **_of_student(problem, student.at(tau))}

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvalues, networks, the features' own weights and the data, by name."""
        back = self.problem.vectors.T
        made = {
            "lambda": self.problem.values,
            "W": self.problem.weights,
            "X": self.problem.data,
            "density.lambda": self.density.at,
            "density.rho": self.density.values,
        }
        for number, network in enumerate(self.teachers):
            made[f"B.{number}"] = network @ back
        for number, student in enumerate(self.students):
            made[f"S.{number}"] = student.limit @ back
        return made

    def _bulks(self) -> dict[str, dict[str, Any]]:
        setting, expected = self.problem.setting, expected_bulks(self.problem.setting, self.density)
        made = {}
        for name, part in setting.bulks().items():
            values = self.problem.values[part]
            low, high = float(values.min()), float(values.max())
            rate = setting.psi_p / (2 * setting.noise)
            made[name] = {
                "count": len(values),
                "low": low,
                "high": high,
                "tau": [rate / high, rate / low],
                "expected": expected.get(name),
            }
        return made

    def _ends(self) -> Iterator[dict[str, Any]]:
        problem = self.problem
        bulks = problem.setting.bulks().items()
        for tau, network, student in zip(
            self.plan.teacher_taus, self.teachers, self.students, strict=True
        ):
            yield {
                "teacher_tau": tau,
                "kappa": {name: float(student.kappa[part].mean()) for name, part in bulks},
                "slowest": 1 / float(student.rates.real.min()),
                # What the student begins as: its map_err is what distillation brings down.
                "teacher": {**_of_teacher(problem, network), **_of_student(problem, network)},
                "converged": _of_student(problem, student.limit),
            }


def study(setting: Setting, plan: Plan) -> Study:
    """Draw the model, train its teachers, and distill a student from each.

    Raises:
        UsageError: of the settings, or where gradient descent diverges.
    """
    if not 0 < plan.delta < setting.time:
        raise UsageError(f"--delta {plan.delta:g} is not between 0 and --time {setting.time:g}")
    problem = draw_problem(setting, plan.seed, plan.fixed_draws)
    descent = None if plan.learning_rate is None else Descent(plan.learning_rate)
    teachers = [teacher(problem, tau, descent) for tau in plan.teacher_taus]
    draws = plan.draws or math.ceil(DRAWS_PER_FEATURE * setting.features / setting.samples)
    students = [
        distill(problem, network, plan.delta, network if plan.from_teacher else None, draws, seed)
        for seed, network in enumerate(teachers, plan.seed + 1)
    ]
    return Study(plan, problem, density(setting), descent, teachers, students)


def expected_bulks(setting: Setting, limit: Density) -> dict[str, list[float]]:
    """Lowest and highest eigenvalue of the bulks in the limit; one that is not apart is left out.

    With several variances the bulk that generalizes may be in several parts.
    """
    bounds = dict(zip(BULKS, (1 / setting.psi_p, setting.psi_n / setting.psi_p, 1.0), strict=True))
    made: dict[str, list[float]] = {"null": [limit.s2, limit.s2]}
    above = 0.0
    for low, high, mass in reversed(limit.supports()):
        middle = above + mass / 2
        name = next((name for name, bound in bounds.items() if middle < bound), "null")
        ends = made.setdefault(name, [low, high])
        made[name] = [min(ends[0], low), max(ends[1], high)]
        above += mass
    return made


def _of_teacher(problem: Problem, network: Tensor) -> dict[str, float]:
    """The losses of a denoiser, and what both roles have."""
    return {**losses(problem, network)._asdict(), **_memory(problem, network)}


def _of_student(problem: Problem, network: Tensor) -> dict[str, float]:
    """The error of the map, in place of these losses, and what both roles have."""
    return {"map_err": map_error(problem, network), **_memory(problem, network)}


def _memory(problem: Problem, network: Tensor) -> dict[str, float]:
    """How much nearer to its training data than to fresh data it comes, and where its weights are.

    With f_S(x_t) - x = e^t sqrt(D) (xi + sqrt(D) S phi), the loss of S as a denoiser is the squared
    distance of f_S(x_t) from x, in e^2t D. What it is says nothing of a student; that it is less on
    the training set does. Of N(0, I) a perfect student has (1 - e^-t) / D times the S of a perfect
    denoiser, so that gap and norms compare networks of one role.
    """
    found = losses(problem, network)
    sizes = {f"norm_{name}": size for name, size in norms(problem, network).items()}
    return {"gap": found.test - found.train, **sizes}
