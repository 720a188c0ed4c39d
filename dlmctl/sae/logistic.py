"""Logistic regression with an L2 penalty, on dense and on sparse columns.

    loss(w, b) = mean_i log(1 + exp(-y_i (x_i w + b))) + 1/2 sum_j penalty_j w_j^2        y_i = +-1

in float64, by L-BFGS. In scikit-learn's terms C = 1 / (N penalty). A sparse row has K columns, as
the code of a Top-K autoencoder; nothing of size N x F is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MOST_STEPS = 200
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
) -> Logistic:
    """The minimum of the loss.

    Args:
        labels: bool [N].
        penalties: float64 [D + F], above 0.
        start: where to begin; zeros by default, with the log odds of the labels' mean.
        tolerance: the largest entry of the gradient that ends the fit.
    """
    count = len(labels)
    if start is None:
        rate = (labels.double().sum() + 0.5) / (count + 1)
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
        errors = (scores.sigmoid() - labels.double()) / count
        slope = (design.transposed_times(errors) + penalties * weights) * scale
        variables.grad = torch.cat([slope, errors.sum()[None]])
        return losses(scores, labels).mean() + (penalties * weights * weights).sum() / 2

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
