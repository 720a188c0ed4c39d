"""Logistic regression with an L2 penalty, on standardized columns.

    minimize   |w|^2 / 2 + S sum_i p_i log(1 + exp(-y_i (w x_i + b))),   y = +1 or -1,  sum p_i = 1

with the columns of x at mean 0 and variance 1, so that the penalty does not depend on their units;
this is scikit-learn's LogisticRegression with C = 1 and sample weights S p. Constant columns get
weight 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

STEPS = 500
"""Most iterations of L-BFGS; it ends when the gradient is small, which takes tens of them."""


class Probe(NamedTuple):
    """A linear classifier."""

    weight: Tensor
    """float64 [D], for columns in their own units."""
    bias: Tensor
    """float64 []."""

    def scores(self, x: Tensor) -> Tensor:
        """Log-odds float64 [S] of rows [S, D]; above 0 it says yes."""
        return x.double() @ self.weight + self.bias


def fit_probe(x: Tensor, present: Tensor, stratum: Tensor | None = None) -> Probe:
    """Fit a probe to rows [S, D] with labels bool [S], of which some are true and some are not.

    Args:
        stratum: int64 [S]; all strata weigh the same. None: the two labels.
    """
    weights = equal_weights(present.long() if stratum is None else stratum)
    rows, target = x.double(), present.double()
    mean, deviation = rows.mean(dim=0), rows.std(dim=0, unbiased=False)
    varied = deviation > 1e-12 * rows.abs().amax(dim=0)
    scale = torch.where(varied, 1 / deviation.where(varied, 1), 0)
    columns = (rows - mean) * scale  # [S, D]
    parameters = columns.new_zeros(columns.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=STEPS,
        tolerance_grad=1e-7,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        slope, intercept = parameters[:-1], parameters[-1]
        logits = columns @ slope + intercept
        fit = functional.binary_cross_entropy_with_logits(logits, target, weights, reduction="sum")
        value: Tensor = slope.square().sum() / 2 + len(rows) * fit
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    weight = parameters.detach()[:-1] * scale
    return Probe(weight, parameters.detach()[-1] - weight @ mean)


def equal_weights(stratum: Tensor) -> Tensor:
    """float64 [S] with sum 1: those of each stratum of int64 [S] have the same sum."""
    _, place, sizes = stratum.unique(return_inverse=True, return_counts=True)
    return 1 / (sizes[place].double() * len(sizes))
