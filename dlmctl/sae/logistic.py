"""Logistic regression with an L2 penalty, on dense and on sparse columns.

    loss(w, b) = sum_i p_i log(1 + exp(-y_i (x_i w + b))) + 1/2 sum_j penalty_j w_j^2     y_i = +-1

with sum_i p_i = 1, in float64, by L-BFGS. In scikit-learn's terms C = 1 / (N penalty). A sparse row
has K columns, as the code of a Top-K autoencoder; nothing of size N x F is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MOST_STEPS = 500
TOLERANCE, ROUGH = 1e-7, 1e-5
"""Of the largest entry of the gradient, for a fit and for one that chooses a penalty."""


class Design(NamedTuple):
    """N rows of D dense columns and F sparse ones."""

    dense: Tensor
    """float64 [N, D]."""
    values: Tensor
    """float64 [N, K], of the sparse columns."""
    columns: Tensor
    """int64 [N, K], which they are, from 0 to F - 1."""
    sparse: int
    """F."""

    @classmethod
    def of(cls, dense: Tensor) -> Design:
        """Dense columns alone."""
        none = torch.zeros(len(dense), 0)
        return cls(dense.double(), none.double(), none.long(), 0)

    @property
    def width(self) -> int:
        """D + F, the number of weights."""
        return self.dense.shape[1] + self.sparse

    def rows(self, chosen: Tensor) -> Design:
        """Those of the rows that are chosen, bool [N] or int64."""
        return Design(self.dense[chosen], self.values[chosen], self.columns[chosen], self.sparse)

    def times(self, weights: Tensor) -> Tensor:
        """X w, float64 [N]."""
        dense, sparse = weights.split([self.dense.shape[1], self.sparse])
        scores = self.dense @ dense
        if self.sparse:
            scores = scores + (self.values * sparse[self.columns]).sum(dim=1)
        return scores

    def transposed_times(self, errors: Tensor) -> Tensor:
        """X' e, float64 [D + F], for errors [N]."""
        sparse = errors.new_zeros(self.sparse)
        parts = (self.values * errors[:, None]).flatten()
        sparse.index_add_(0, self.columns.flatten(), parts)
        return torch.cat([self.dense.T @ errors, sparse])


class Logistic(NamedTuple):
    """A fitted regression."""

    weights: Tensor
    """float64 [D + F]."""
    intercept: Tensor
    """float64 []."""

    def scores(self, design: Design) -> Tensor:
        """Log odds, float64 [N]."""
        return design.times(self.weights) + self.intercept


def losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, [N], of labels bool [N] under log odds [N]."""
    return functional.softplus(torch.where(labels, -scores, scores))


def fit(
    design: Design,
    labels: Tensor,
    penalties: Tensor,
    start: Logistic | None = None,
    tolerance: float = TOLERANCE,
    shares: Tensor | None = None,
) -> Logistic:
    """The minimum of the loss.

    Args:
        labels: bool [N].
        penalties: float64 [D + F], above 0.
        start: where to begin; zeros by default, with the log odds of the labels' mean.
        tolerance: the largest entry of the gradient that ends the fit.
        shares: float64 [N] with sum 1, of the rows in the mean loss; None: all the same.
    """
    target = labels.double()
    if shares is None:
        shares = torch.full_like(target, 1 / len(target))
    if start is None:
        rate = ((shares @ target) * len(target) + 0.5) / (len(target) + 1)
        start = Logistic(penalties.new_zeros(design.width), rate.logit())
    # In the variables v = w sqrt(penalty + 1/4): columns of variance 1 then curve alike.
    scale = (penalties + 0.25).rsqrt()
    variables = torch.cat([start.weights / scale, start.intercept[None]]).requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [variables],
        max_iter=MOST_STEPS,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.no_grad()
    def loss() -> Tensor:
        weights, intercept = variables[:-1] * scale, variables[-1]
        scores = design.times(weights) + intercept
        errors = (scores.sigmoid() - target) * shares
        slope = (design.transposed_times(errors) + penalties * weights) * scale
        variables.grad = torch.cat([slope, errors.sum()[None]])
        return shares @ losses(scores, labels) + (penalties * weights * weights).sum() / 2

    optimizer.step(loss)
    final = variables.detach()
    return Logistic(final[:-1] * scale, final[-1])


def best_penalty(
    design: Design, labels: Tensor, folds: Tensor, grid: Sequence[Tensor]
) -> tuple[int, list[float]]:
    """The penalties of a grid whose held-out loss is least, by cross-validation.

    Args:
        labels: bool [N].
        folds: int64 [N], which fold each row is held out in.
        grid: penalties float64 [D + F] each, the largest first: each fit begins at the one before.

    Returns:
        The number of the best, and the mean held-out loss of each, in nats.
    """
    totals = [0.0] * len(grid)
    for fold in folds.unique().tolist():
        held = folds == fold
        train, test = design.rows(~held), design.rows(held)
        found: Logistic | None = None
        for number, penalties in enumerate(grid):
            found = fit(train, labels[~held], penalties, found, ROUGH)
            totals[number] += float(losses(found.scores(test), labels[held]).sum())
    means = [total / len(labels) for total in totals]
    return means.index(min(means)), means


class Probe(NamedTuple):
    """A linear classifier of rows of D numbers."""

    weight: Tensor
    """float64 [D], for columns in their own units."""
    bias: Tensor

    def scores(self, x: Tensor) -> Tensor:
        """Log odds float64 [S] of rows [S, D]; above 0 it says yes."""
        return x.double() @ self.weight + self.bias


def fit_probe(x: Tensor, present: Tensor, stratum: Tensor | None = None) -> Probe:
    """A probe with penalty 1 / S on standardized columns, which do not depend on their units.

    Constant columns get weight 0. It is scikit-learn's LogisticRegression with C = 1.

    Args:
        x: [S, D].
        present: bool [S], of which some are true and some are not.
        stratum: int64 [S]; all strata weigh the same. None: the two labels.
    """
    rows = x.double()
    mean, deviation = rows.mean(dim=0), rows.std(dim=0, unbiased=False)
    varied = deviation > 1e-12 * rows.abs().amax(dim=0)
    scale = torch.where(varied, 1 / deviation.where(varied, 1), 0)
    penalties = torch.full_like(mean, 1 / len(rows))
    shares = equal_weights(present.long() if stratum is None else stratum)
    fitted = fit(Design.of((rows - mean) * scale), present, penalties, shares=shares)
    weight = fitted.weights * scale
    return Probe(weight, fitted.intercept - weight @ mean)


def equal_weights(stratum: Tensor) -> Tensor:
    """float64 [S] with sum 1: those of each stratum of int64 [S] have the same sum."""
    _, place, sizes = stratum.unique(return_inverse=True, return_counts=True)
    return 1 / (sizes[place].double() * len(sizes))
