"""Losses of a model's whole predictions, with gradient: divergence from a target, and entropy.

As in `diffusion.fused_linear_logprob`, only the logits of a few positions are in memory at a time,
and the gradient of a chunk is computed while they are. With p the target's predictions, q the
student's, z the student's logits and c a factor for each position, value and gradient by z are

    kl-fwd    c KL(p || q) = c sum_v p (log p - log q)      c (q - p)
    kl-bwd    c KL(q || p) = c sum_v q (log q - log p)      c q (log q - log p - KL(q || p))
    entropy   c H(q) = -c sum_v q log q                     -c q (log q + H(q))

(SDTT, arXiv 2410.21035, has both divergences; kl-bwd is its default. dParallel, arXiv 2509.26488,
has the entropy, of tokens that are predicted rightly.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dlmctl.diffusion.fused_linear_logprob import cap_, rows_per_chunk, scaled_, wide
from dlmctl.models.policy import Policy
from dlmctl.settings.distill import Divergence

Loss = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""From logits [C, V] of the positions in a slice to their loss, a scalar, and its gradient
[C, V]."""


def weighted_divergence(
    student: Policy,
    states: Tensor,
    target: Policy,
    goals: Tensor,
    coefficients: Tensor,
    kind: Divergence,
) -> Tensor:
    """sum_n c_n D_n, a scalar in nats, with gradient for the student's states and weights.

    Args:
        states: the student's hidden states [N, H].
        goals: the target's hidden states [N, H'] for the same tokens; both models have the same
            vocabulary.
        coefficients: float [N], c; treated as constants.
    """
    goals = goals.detach()

    def loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        log_q = logits.log_softmax(-1)
        log_p = wide(target.head.logits(goals[part])).log_softmax(-1)
        factor = coefficients[part].to(log_q)
        if kind == "kl-fwd":
            p = log_p.exp()
            value = (factor * (p * (log_p - log_q)).sum(-1)).sum()
            return value, (log_q.exp() - p) * factor[:, None]
        q, apart = log_q.exp(), log_q - log_p
        distance = (q * apart).sum(-1, keepdim=True)
        return (factor * distance[:, 0]).sum(), q * (apart - distance) * factor[:, None]

    return _summed(student, states, loss)


def weighted_entropy(
    student: Policy, states: Tensor, targets: Tensor, coefficients: Tensor, temperature: float
) -> Tensor:
    """sum_n c_n H(softmax(z_n / temperature)) over the n whose most probable token is the target.

    Args:
        states: hidden states [N, H].
        targets: int64 [N].
        coefficients: float [N], c; treated as constants.

    Returns:
        A scalar in nats, with gradient for the student's states and weights.
    """

    def loss(logits: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        right = logits.argmax(-1) == targets[part]
        factor = coefficients[part].to(logits) * right
        log_q = (logits / temperature).log_softmax(-1)
        q = log_q.exp()
        entropy = -(q * log_q).sum(-1, keepdim=True)
        away = q * (log_q + entropy) * (-factor / temperature)[:, None]
        return (factor * entropy[:, 0]).sum(), away

    return _summed(student, states, loss)


def _summed(student: Policy, states: Tensor, loss: Loss) -> Tensor:
    head = student.head
    projection = head.projection
    value: Tensor = _Summed.apply(
        head.transform(states), projection.weight, projection.bias, loss, head.cap
    )
    return value


class _Summed(torch.autograd.Function):
    """The sum of a loss over chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, loss: Loss, cap: float | None
    ) -> Tensor:
        by_states, by_weight, by_bias = ctx.needs_input_grad[:3]
        d_states = torch.zeros_like(states) if by_states else None
        d_weight = torch.zeros_like(weight) if by_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and by_bias else None
        value = states.new_zeros((), dtype=torch.float64)
        size = max(1, rows_per_chunk(len(weight)) // 3)
        for start in range(0, len(states), size):
            part = slice(start, start + size)
            rows = states[part]
            logits = wide(functional.linear(rows, weight, bias))
            slope = None if cap is None else cap_(logits, cap)
            of_chunk, away = loss(logits, part)
            value += of_chunk
            if slope is not None:
                away.mul_(slope)
            if d_bias is not None:
                d_bias += away.sum(0).to(d_bias)
            away = away.to(rows)
            if d_states is not None:
                d_states[part] = away @ weight.to(rows)
            if d_weight is not None:
                d_weight += (away.T @ rows).to(d_weight)
        ctx.save_for_backward(d_states, d_weight, d_bias)
        return value.to(wide(states).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return *scaled_(ctx.saved_tensors, upstream), None, None
