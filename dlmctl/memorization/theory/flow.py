"""Training of the random-feature score network in closed form, and of its consistency student.

Teacher: gradient flow on the loss from B = 0, time tau scaled as in Bonnaire et al. 2025:

    B(tau) = -V^T U^-1 (I - exp(-2 D U tau / psi_p)) / sqrt(D)

For k steps of gradient descent of learning rate eta the exponential is (I - 2 D eta U / d)^k, and
tau is psi_p eta k / d.

Student (ours; what the paper on consistency distillation derives could not be read): the
consistency function f_S(y, t) = e^t (y + D_t S phi(y)), which is y at t = 0, is regressed at x_t on
its fixed self at the point where a step of the teacher's probability flow ends,

    y_s = x_t + delta (x_t + B_T phi(x_t)),   s = t - delta

With alpha = e^t D_t, beta = e^s D_s, C = E[phi(y_s) phi(x_t)^T], M = alpha U - beta C and
R = E[(e^t x_t - e^s y_s) phi(x_t)^T] the flow is

    dS/dtau = -(2 alpha / psi_p) (S M + R),   S(tau) = S* + (S_0 - S*) exp(-(2 alpha/psi_p) M tau)

with S* = -R M^-1. R is exact; of C only the mean of (phi(y_s) - phi(x_t)) phi(x_t)^T is drawn, the
rest is U. A teacher that learned from draws of the noise has a student that learns from the same.

A student estimates no score: what f_S is to be is the end of the path, of which the score of the
population is known. In a direction of variance lambda the probability flow
dx/dt = -x + x / gamma_t, gamma_t = lambda e^-2t + D_t, keeps x / sqrt(gamma_t), so that

    f*(y) = y sqrt(lambda / gamma_t)

S phi = -y / gamma, for which f_S would be Tweedie's mean of the data given y, is not that map: the
losses of a denoiser are wrong for a student.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.theory.random_features import BATCH, Problem, noise_variance, noisy_samples
from dlmctl.records.errors import UsageError

KAPPA_SAMPLES = 4096
"""Noisy samples that are enough for kappa, of which the mean over a bulk is looked at."""


class Descent(NamedTuple):
    """Gradient descent instead of gradient flow."""

    learning_rate: float

    def steps(self, problem: Problem, tau: float) -> int:
        """The number of steps nearest to a time."""
        setting = problem.setting
        return round(tau * setting.dimension / (setting.psi_p * self.learning_rate))


class Student(NamedTuple):
    """A consistency student of one teacher, in the eigenvectors of U."""

    drift: Tensor
    """float64 [p, p], M."""
    target: Tensor
    """float64 [d, p], R."""
    limit: Tensor
    """float64 [d, p], S*."""
    rates: Tensor
    """complex128 [p], (2 alpha / psi_p) times the eigenvalues of M; the flow ends where all have a
    positive real part."""
    left: Tensor
    """complex128 [d, p], (S_0 - S*) times the right eigenvectors of M."""
    right: Tensor
    """complex128 [p, p], the inverse of the eigenvectors."""
    kappa: Tensor
    """float64 [p], E[(q . (phi(x_t) - phi(y_s)))^2] / lambda_q of each eigen-direction q."""

    def at(self, tau: float) -> Tensor:
        """S(tau)."""
        return self.limit + ((self.left * torch.exp(-self.rates * tau)) @ self.right).real


def teacher(problem: Problem, tau: float, descent: Descent | None = None) -> Tensor:
    """B(tau) in the eigenvectors of U, float64 [d, p].

    Raises:
        UsageError: the learning rate makes gradient descent diverge.
    """
    setting, values = problem.setting, problem.values
    if descent is None:
        learned = -torch.expm1(-2 * setting.noise * values * tau / setting.psi_p)
    else:
        step = 2 * setting.noise * descent.learning_rate / setting.dimension * values
        if float(step.max()) >= 2:
            most = 2 * descent.learning_rate / float(step.max())
            raise UsageError(
                f"--lr {descent.learning_rate:g} diverges: it must be below {most:.4g}"
            )
        learned = 1 - (1 - step) ** descent.steps(problem, tau)
    return -(problem.noise_product.T / values) * learned / math.sqrt(setting.noise)


def distill(
    problem: Problem, network: Tensor, delta: float, start: Tensor | None, draws: int, seed: int
) -> Student:
    """The consistency student of a teacher.

    Args:
        network: the teacher's B in the eigenvectors of U, float64 [d, p].
        delta: from t to s, below t.
        start: S_0, likewise; None is 0.
        draws: of the noise for each sample, for C; passed over where the problem has its own.
        seed: of these draws.

    Raises:
        UsageError: delta is not between 0 and t; or there are so few draws that S* is no end of
            the flow.
    """
    setting = problem.setting
    if not 0 < delta < setting.time:
        raise UsageError(f"--delta {delta:g} is not between 0 and --time {setting.time:g}")
    alpha = math.exp(setting.time) * setting.noise
    grown = math.exp(setting.time - delta)
    beta = grown * noise_variance(setting.time - delta)
    draws, seed = (problem.draws, problem.noise_seed) if problem.draws else (draws, seed)
    change, kappa = _change(problem, network, delta, draws, seed)
    drift = torch.diag((alpha - beta) * problem.values) - beta * change
    target = (math.exp(setting.time) - grown * (1 + delta)) * problem.input_product.T
    target = target - grown * delta * network * problem.values
    limit = -torch.linalg.solve(drift.T, target.T).T
    values, vectors = torch.linalg.eig(drift)
    begin = torch.zeros_like(limit) if start is None else start
    left = (begin - limit).to(vectors.dtype) @ vectors
    rates = 2 * alpha / setting.psi_p * values
    if float(rates.real.min()) <= 0:
        raise UsageError(f"--noise-draws {draws} are too few: the student does not converge")
    return Student(drift, target, limit, rates, left, torch.linalg.inv(vectors), kappa)


def map_error(problem: Problem, network: Tensor) -> float:
    """E|f_S(y) - f*(y)|^2 / d over fresh y at time t, per dimension.

    Args:
        network: S in the eigenvectors of U, float64 [d, p]; of a teacher's B, the error of its
            estimate of the data in one step, which is above 0 for the true score too.
    """
    setting = problem.setting
    grown, spectrum = math.exp(setting.time), setting.spectrum()
    gamma = math.exp(-2 * setting.time) * spectrum + setting.noise
    weight = grown * setting.noise
    away = grown - (spectrum / gamma).sqrt()  # f_S - f* = away y + weight S phi
    error = float((away.square() * gamma).sum())
    error += 2 * weight * float((network.T * problem.slope * (away * gamma)).sum())
    error += weight**2 * float(((network @ problem.population) * network).sum())
    return error / setting.dimension


def _change(
    problem: Problem, network: Tensor, delta: float, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """E[(phi(y_s) - phi(x_t)) phi(x_t)^T], and kappa, in the eigenvectors of U.

    Features are float32, whose rounding is far below the error of the draws.
    """
    setting = problem.setting
    rows = (problem.weights / math.sqrt(setting.dimension)).float()
    plain, vectors = (network @ problem.vectors.T).float(), problem.vectors.float()
    change = torch.zeros_like(problem.vectors)
    count = len(problem.data)
    moved, enough = torch.zeros_like(problem.values), min(draws, KAPPA_SAMPLES // count + 1)
    parts = noisy_samples(setting, problem.data, draws, seed)
    for number, (_, y, _) in enumerate(parts):
        phi = torch.tanh(rows @ y)
        away = torch.tanh(rows @ (y + delta * (y + plain @ phi))) - phi
        change += away @ phi.T
        if number < enough * -(-count // BATCH):
            moved += ((vectors.T @ away) ** 2).sum(1)
    change = problem.vectors.T @ (change / (draws * count)) @ problem.vectors
    return change, moved / (enough * count) / problem.values
