"""A study of the random-feature model as records: spectrum, teachers, consistency students."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from dlmctl.memorization.theory.closed_form import (
    Student,
    check_delta,
    descent_steps,
    distill_student,
    kept_by_perfect,
    map_error,
    train_teacher,
)
from dlmctl.memorization.theory.density import Density, density
from dlmctl.memorization.theory.random_features import (
    Problem,
    constants,
    draw_problem,
    losses,
    norms,
)
from dlmctl.settings.theory import BULKS, FeatureModel, FeatureTraining

DRAWS_PER_FEATURE = 20
"""Noisy samples per feature, if --noise-draws does not say."""


class TheoryStudy(NamedTuple):
    """Everything that takes long to compute."""

    training: FeatureTraining
    problem: Problem
    density: Density
    teachers: list[Tensor]
    """float64 [d, p] each, in the eigenvectors of U."""
    students: list[Student]

    def header(self) -> dict[str, Any]:
        """Constants, bulks, and the end of each student's training."""
        model, training = self.problem.model, self.training
        return {
            "role": "theory",
            "dimension": model.dimension,
            "samples": model.samples,
            "features": model.features,
            "time": model.time,
            "variances": model.eigenvalues,
            "delta": training.delta,
            "draws": training.draws,
            "seed": training.seed,
            "constants": {**constants(model)._asdict(), "D": model.noise},
            "kept_by_perfect": kept_by_perfect(model),
            "bulks": self._bulks(),
            "students": [*self._ends()],
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """A record for each role and training time."""
        problem, training = self.problem, self.training
        for tau in training.times:
            row = {"role": "teacher", "tau": tau}
            if training.lr is not None:
                row["step"] = descent_steps(problem.model, training.lr, tau)
            yield {**row, **_of_teacher(problem, train_teacher(problem, tau, training.lr))}
        for ended, student in zip(training.teacher_times, self.students, strict=True):
            for tau in training.times:
                row = {"role": "student", "tau": tau, "teacher_tau": ended}
                yield {**row, **_of_student(problem, student.at(tau))}

    def tensors(self) -> dict[str, Tensor]:
        """Eigenvalues, networks, the features' own weights and the data, by name."""
        back = self.problem.vectors.T
        return {
            "lambda": self.problem.values,
            "W": self.problem.weights,
            "X": self.problem.data,
            "density.lambda": self.density.at,
            "density.rho": self.density.values,
            **{f"B.{n}": network @ back for n, network in enumerate(self.teachers)},
            **{f"S.{n}": student.limit @ back for n, student in enumerate(self.students)},
        }

    def directions(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each student kappa and |S q| / |B q|, float64 [p], of the directions q of U."""
        for network, student in zip(self.teachers, self.students, strict=True):
            yield student.kappa, student.limit.norm(dim=0) / network.norm(dim=0)

    def _bulks(self) -> dict[str, dict[str, Any]]:
        model = self.problem.model
        expected, rate = expected_bulks(model, self.density), model.psi_p / (2 * model.noise)
        bulks = {}
        for name, part in model.bulks().items():
            values = self.problem.values[part]
            low, high = float(values.min()), float(values.max())
            bulks[name] = {
                "count": len(values),
                "low": low,
                "high": high,
                "tau": [rate / high, rate / low],
                "expected": expected.get(name),
            }
        return bulks

    def _ends(self) -> Iterator[dict[str, Any]]:
        problem = self.problem
        bulks = problem.model.bulks().items()
        for tau, network, student in zip(
            self.training.teacher_times, self.teachers, self.students, strict=True
        ):
            before, after = norms(problem, network), norms(problem, student.limit)
            yield {
                "teacher_tau": tau,
                "kappa": {name: float(student.kappa[part].mean()) for name, part in bulks},
                "kept": {name: after[name] / before[name] for name, _ in bulks},
                "slowest": 1 / float(student.rates.real.min()),
                # The initial student, whose map_err distillation brings down.
                "teacher": {**_of_teacher(problem, network), **_of_student(problem, network)},
                "converged": _of_student(problem, student.limit),
            }


def study(model: FeatureModel, training: FeatureTraining) -> TheoryStudy:
    """Draw the model, train its teachers, and distil a student from each.

    Raises:
        UsageError: the settings do not fit each other, or gradient descent diverges.
    """
    check_delta(model, training.delta)  # before anything takes long
    problem = draw_problem(model, training.seed, training.draws)
    teachers = [train_teacher(problem, tau, training.lr) for tau in training.teacher_times]
    draws = training.noise_draws or math.ceil(DRAWS_PER_FEATURE * model.features / model.samples)
    from_teacher = training.student_init == "teacher"
    students = [
        distill_student(
            problem, network, training.delta, network if from_teacher else None, draws, seed
        )
        for seed, network in enumerate(teachers, training.seed + 1)
    ]
    return TheoryStudy(training, problem, density(model), teachers, students)


def expected_bulks(model: FeatureModel, limit: Density) -> dict[str, list[float]]:
    """Lowest and highest eigenvalue of the bulks in the limit, without those that are not separate.

    With several variances the bulk that generalizes may have several parts.
    """
    bounds = dict(zip(BULKS, (1 / model.psi_p, model.psi_n / model.psi_p, 1.0), strict=True))
    bulks: dict[str, list[float]] = {"null": [limit.s2, limit.s2]}
    above = 0.0
    for low, high, mass in reversed(limit.supports()):
        middle = above + mass / 2
        name = next((name for name, bound in bounds.items() if middle < bound), "null")
        ends = bulks.setdefault(name, [low, high])
        bulks[name] = [min(ends[0], low), max(ends[1], high)]
        above += mass
    return bulks


def _of_teacher(problem: Problem, network: Tensor) -> dict[str, float]:
    """The losses of a denoiser, and the figures of both roles."""
    return {**losses(problem, network)._asdict(), **_memory(problem, network)}


def _of_student(problem: Problem, network: Tensor) -> dict[str, float]:
    """The error of the map, in place of these losses, and the figures of both roles."""
    return {"map_err": map_error(problem, network), **_memory(problem, network)}


def _memory(problem: Problem, network: Tensor) -> dict[str, float]:
    """How much closer it comes to its training data than to fresh data, and norms of its weights.

    With f_S(x_t) - x = e^t sqrt(D) (xi + sqrt(D) S phi), the loss of S as a denoiser is the squared
    distance of f_S(x_t) from x, in units of e^2t D. For a student its value means nothing, but that
    it is lower on the training set does. For N(0, I) a perfect student has (1 - e^-t) / D times the
    S of a perfect denoiser, so that gap and norms compare networks of one role only.
    """
    found = losses(problem, network)
    sizes = {f"norm_{name}": size for name, size in norms(problem, network).items()}
    return {"gap": found.test - found.train, **sizes}
