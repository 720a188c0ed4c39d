"""Training of the random-feature score network in closed form, and of its consistency student.

Teacher: gradient flow on the loss from B = 0, time tau scaled as in Bonnaire et al. 2025:

    B(tau) = -V^T U^-1 (I - exp(-2 D U tau / psi_p)) / sqrt(D)

For k steps of gradient descent of learning rate eta the exponential is (I - 2 D eta U / d)^k, and
tau is psi_p eta k / d.

Student (ours; we could not read the derivation in the paper on consistency distillation): the
consistency function f_S(y, t) = e^t (y + D_t S phi(y)), which is y at t = 0, is regressed at x_t on
its own fixed value at the point at which a step of the teacher's probability flow ends,

    y_s = x_t + delta (x_t + B_T phi(x_t)),   s = t - delta

With alpha = e^t D_t, beta = e^s D_s, C = E[phi(y_s) phi(x_t)^T], M = alpha U - beta C and
R = E[(e^t x_t - e^s y_s) phi(x_t)^T] the flow is

    dS/dtau = -(2 alpha / psi_p) (S M + R),   S(tau) = S* + (S_0 - S*) exp(-(2 alpha/psi_p) M tau)

with S* = -R M^-1. R is exact; in C only the mean of (phi(y_s) - phi(x_t)) phi(x_t)^T is drawn, the
rest is U. A teacher that learned from draws of the noise has a student that learns from the same.

A student does not estimate a score: the target of f_S is the end of the path, which follows from
the known score of the population. In a direction of variance lambda the probability flow
dx/dt = -x + x / gamma_t, gamma_t = lambda e^-2t + D_t, keeps x / sqrt(gamma_t), so that

    f*(y) = y sqrt(lambda / gamma_t)

S phi = -y / gamma, for which f_S would be Tweedie's mean of the data given y, is not this map: the
losses of a denoiser are wrong for a student.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.theory.random_features import BATCH, Problem, data_spectrum, noisy_samples
from dlmctl.records.errors import UsageError
from dlmctl.settings.theory import FeatureModel, noise_variance

KAPPA_SAMPLES = 4096
"""Noisy samples that suffice for kappa, of which only the mean over a bulk is used."""


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


def descent_steps(model: FeatureModel, lr: float, tau: float) -> int:
    """The number of steps of gradient descent that is nearest to a time."""
    return round(tau * model.dimension / (model.psi_p * lr))


def train_teacher(problem: Problem, tau: float, lr: float | None = None) -> Tensor:
    """B(tau) in the eigenvectors of U, float64 [d, p].

    Args:
        lr: learning rate of gradient descent; None is gradient flow.

    Raises:
        UsageError: the learning rate makes gradient descent diverge.
    """
    model, values = problem.model, problem.values
    if lr is None:
        learned = -torch.expm1(-2 * model.noise * values * tau / model.psi_p)
    else:
        step = 2 * model.noise * lr / model.dimension * values
        if float(step.max()) >= 2:
            most = 2 * lr / float(step.max())
            raise UsageError(f"--lr {lr:g} diverges: it must be below {most:.4g}")
        learned = 1 - (1 - step) ** descent_steps(model, lr, tau)
    return -(problem.noise_product.T / values) * learned / math.sqrt(model.noise)


def check_delta(model: FeatureModel, delta: float) -> None:
    """Raise UsageError unless a step of length delta ends between time 0 and t."""
    if not 0 < delta < model.time:
        raise UsageError(f"--delta {delta:g} is not between 0 and --time {model.time:g}")


def distill_student(
    problem: Problem, network: Tensor, delta: float, start: Tensor | None, draws: int, seed: int
) -> Student:
    """The consistency student of a teacher.

    Args:
        network: the teacher's B in the eigenvectors of U, float64 [d, p].
        delta: from t to s, below t.
        start: S_0, in the same basis; None is 0.
        draws: of the noise per sample, for C; ignored if the problem has draws of its own.
        seed: of these draws.

    Raises:
        UsageError: delta is not between 0 and t, or there are so few draws that the flow does not
            end in S*.
    """
    model = problem.model
    check_delta(model, delta)
    alpha = math.exp(model.time) * model.noise
    grown = math.exp(model.time - delta)
    beta = grown * noise_variance(model.time - delta)
    draws, seed = (problem.draws, problem.noise_seed) if problem.draws else (draws, seed)
    change, kappa = _change(problem, network, delta, draws, seed)
    drift = torch.diag((alpha - beta) * problem.values) - beta * change
    target = (math.exp(model.time) - grown * (1 + delta)) * problem.input_product.T
    target = target - grown * delta * network * problem.values
    limit = -torch.linalg.solve(drift.T, target.T).T
    values, vectors = torch.linalg.eig(drift)
    begin = torch.zeros_like(limit) if start is None else start
    left = (begin - limit).to(vectors.dtype) @ vectors
    rates = 2 * alpha / model.psi_p * values
    if float(rates.real.min()) <= 0:
        raise UsageError(f"--noise-draws {draws} are too few: the student does not converge")
    return Student(drift, target, limit, rates, left, torch.linalg.inv(vectors), kappa)


def map_error(problem: Problem, network: Tensor) -> float:
    """E|f_S(y) - f*(y)|^2 / d over fresh y at time t, per dimension.

    Args:
        network: S in the eigenvectors of U, float64 [d, p]. For a teacher's B this is the error of
            its one-step estimate of the data, which is above 0 for the true score too.
    """
    model = problem.model
    grown, spectrum = math.exp(model.time), data_spectrum(model)
    gamma = math.exp(-2 * model.time) * spectrum + model.noise
    weight = grown * model.noise
    away = grown - (spectrum / gamma).sqrt()  # f_S - f* = away y + weight S phi
    error = float((away.square() * gamma).sum())
    error += 2 * weight * float((network.T * problem.slope * (away * gamma)).sum())
    error += weight**2 * float(((network @ problem.population) * network).sum())
    return error / model.dimension


def kept_by_perfect(model: FeatureModel) -> float:
    """The share of a perfect denoiser's B that a perfect student's S is, the mean over dimensions.

    With variance l of the data and g of y: B phi = -y / g, and
    S phi = -(1 - e^-t sqrt(l / g)) y / D.
    """
    spectrum = data_spectrum(model)
    gamma = math.exp(-2 * model.time) * spectrum + model.noise
    moved = 1 - math.exp(-model.time) * (spectrum / gamma).sqrt()
    return float((gamma * moved).mean()) / model.noise


def _change(
    problem: Problem, network: Tensor, delta: float, draws: int, seed: int
) -> tuple[Tensor, Tensor]:
    """E[(phi(y_s) - phi(x_t)) phi(x_t)^T], and kappa, in the eigenvectors of U.

    Features are float32, whose rounding is far below the error of the draws.
    """
    model = problem.model
    rows = (problem.weights / math.sqrt(model.dimension)).float()
    plain, vectors = (network @ problem.vectors.T).float(), problem.vectors.float()
    change = torch.zeros_like(problem.vectors)
    count = len(problem.data)
    moved, enough = torch.zeros_like(problem.values), min(draws, KAPPA_SAMPLES // count + 1)
    parts = noisy_samples(model, problem.data, draws, seed)
    for number, (_, y, _) in enumerate(parts):
        phi = torch.tanh(rows @ y)
        away = torch.tanh(rows @ (y + delta * (y + plain @ phi))) - phi
        change += away @ phi.T
        if number < enough * -(-count // BATCH):
            moved += ((vectors.T @ away) ** 2).sum(1)
    change = problem.vectors.T @ (change / (draws * count)) @ problem.vectors
    return change, moved / (enough * count) / problem.values
