"""Role-aware token credit: from the signal of each token to its weight on the advantage.

SRPO (arXiv 2605.07274), of which the abstract could be read: perception tokens are emphasised by
how much they depend on the image, reasoning tokens by how much they depend on the perception that
was written; both share one baseline per trajectory; the weights are positive, so that the reward
and the direction of GRPO's update stay. What follows is ours (form and constants of the weight are
those of RLSD, arXiv 2604.03128). With s_t the signal of token t in nats, P and R the tokens of the
two roles and N both of them:

    s_t <- clamp(s_t, -c, c)
    b   = (1/|N|) sum_N s_t
    v_t = clamp(exp(tau (s_t - b)), 1 - eps, 1 + eps)          on request divided by its mean over N
    w_t = 1 + lambda (v_t - 1) for t in N, 1 elsewhere
    A_t = w_t A
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.records.errors import UsageError
from dlmctl.rl.srpo.roles import OTHER, PERCEPTION, REASONING
from dlmctl.settings.srpo import Credit, WeightMap

MAPS: dict[WeightMap, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "softplus": lambda x: functional.softplus(x) / math.log(2),
    "sigmoid2": lambda x: 2 * torch.sigmoid(x),
    "tanh1": lambda x: 1 + torch.tanh(x),
}
"""All positive, increasing, and 1 at 0."""


LIMIT = 5.0
"""c, in nats: a signal is at most this far from 0."""


class Weighted(NamedTuple):
    """Weights of one completion, and what they came from."""

    weights: Tensor
    """float64 [G], positive."""
    baseline: float
    """b, in nats; 0 without one."""
    clipped_low: float
    """Share of the tokens with a role whose v is at the lower bound."""
    clipped_high: float


def token_weights(
    signal: Tensor, roles: Tensor, advantage: float, credit: Credit, limit: float = LIMIT
) -> Weighted:
    """The weights of a completion's tokens.

    Args:
        signal: float64 [G], s in nats; read only for tokens with a role.
        roles: int64 [G], of `rl.roles`; without any, all weights are 1.
        advantage: of the completion; only its sign is used, and only by `sign_aware`.
        limit: c, in nats.

    Raises:
        UsageError: `traj-ratio` of signals that are not all positive in the mean.
    """
    chosen = roles != OTHER
    ones = torch.ones_like(signal)
    if not chosen.any():
        return Weighted(ones, 0.0, 0.0, 0.0)
    limited = signal[chosen].clamp(-limit, limit)
    baseline = 0.0 if credit.signal_baseline == "none" else float(limited.mean())
    if credit.signal_baseline == "traj-ratio":
        raw = _ratio(limited, baseline) ** credit.tau
    else:
        away = limited - (
            _role_means(limited, roles[chosen])
            if credit.signal_baseline == "role-mean"
            else baseline
        )
        sign = math.copysign(1.0, advantage) if credit.sign_aware and advantage else 1.0
        raw = MAPS[credit.weight_map](sign * credit.tau * away)
    low, high = credit.clip
    v = raw.clamp(low, high)
    if credit.norm == "mean":
        v = v / v.mean()
    weights = ones.masked_scatter(chosen, 1 + credit.strength * (v - 1))
    if not bool((weights > 0).all()):
        raise UsageError("--weight-lambda makes weights that are not positive: take a smaller one")
    return Weighted(
        weights,
        baseline,
        float((raw < low).double().mean()),
        float((raw > high).double().mean()),
    )


def _ratio(signal: Tensor, mean: float) -> Tensor:
    if bool((signal < 0).any()):
        raise UsageError(
            "--credit-baseline traj-ratio divides by the mean signal: take --visual-signal and "
            "--reason-signal k3 or abs-logratio, which are never negative"
        )
    return signal / mean if mean > 0 else torch.ones_like(signal)


def _role_means(signal: Tensor, roles: Tensor) -> Tensor:
    means = torch.zeros_like(signal)
    for role in (PERCEPTION, REASONING):
        if (roles == role).any():
            means[roles == role] = signal[roles == role].mean()
    return means
