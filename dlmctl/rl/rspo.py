"""RSPO: the advantage is a target for the relative log-ratio (arXiv 2605.10218, equation 3.3).

For completions i = 1..N of a batch, with ELBO scores s under shared masks, in nats:

    d_i    = s_theta(y_i | x_i) - s_ref(y_i | x_i)                     relative score
    dhat_i = d_i - mean d                                              centred
    w_i    = A_i - lambda * dhat_i                                     detached: residual feedback
    L      = -(1/N) sum_i w_i * dhat_i

The mean is detached, so that the gradient is

    grad L = -(1/N) sum_i w_i (1/K) sum_k grad s_theta^(k)(y_i | x_i)
           = lambda grad (1/N) sum_i (dhat_i - A_i / lambda)^2 / 2

a regression of the centred log-ratio on the target A / lambda. It is linear in the per-mask scores:
the weights are formed first, without gradient, and then one mask after the other is
back-propagated, in memory that does not grow with K. With whole groups sum_i w_i = 0. lambda = 0 is
REINFORCE on the ELBO.

The paper's lambda is 0.01; whether its score is a sum over the completion or a mean per token could
not be read, so that both are here (`--score-norm`), and `sequence` is our default: a target
A/lambda of a hundred nats can be met by a sequence and not by a token.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Centre = Literal["batch", "prompt"]
ScoreNorm = Literal["sequence", "token"]


class Residual(NamedTuple):
    """Weights of a batch and what they are made of; float64 [N] each."""

    weights: Tensor
    """w_i, what the gradient of each score is multiplied with."""
    centred: Tensor
    """dhat_i."""
    feedback: Tensor
    """lambda * dhat_i, the share of the weight that pulls back."""


def residual_weights(
    advantage: Tensor,
    relative_score: Tensor,
    strength: float,
    groups: Sequence[Hashable] | None = None,
) -> Residual:
    """The detached weights of RSPO's gradient.

    Args:
        advantage: float64 [N], A_i.
        relative_score: float64 [N], d_i in nats (per sequence or per token, as lambda means it).
        strength: lambda.
        groups: the prompt of each completion to centre per prompt; None centres over the batch.
    """
    centred = _centre(relative_score, groups)
    feedback = strength * centred
    return Residual(advantage - feedback, centred, feedback)


def rspo_loss(advantage: Tensor, score: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Equation 3.3 as it is written, for scores [N] with gradient."""
    relative = score - reference
    centred = relative - relative.mean().detach()
    weights = (advantage - strength * centred).detach()
    return -(weights * centred).mean()


def _centre(values: Tensor, groups: Sequence[Hashable] | None) -> Tensor:
    if groups is None:
        return values - values.mean()
    centred = values.clone()
    for group in dict.fromkeys(groups):
        members = torch.tensor([g == group for g in groups])
        centred[members] -= values[members].mean()
    return centred
