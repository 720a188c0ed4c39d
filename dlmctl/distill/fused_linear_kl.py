"""KL divergence between the predictions of two models, with gradient for one of them.

As in `diffusion.fused_linear_logprob`, only the logits of a few positions are in memory at a time,
and the gradient of a chunk is computed while they are. With p the target's predictions, q the
student's, z the student's logits and c a factor for each position, value and gradient by z are

    kl-fwd    c KL(p || q) = c sum_v p (log p - log q)      c (q - p)
    kl-bwd    c KL(q || p) = c sum_v q (log q - log p)      c q (log q - log p - KL(q || p))

(SDTT, arXiv 2410.21035, has both; kl-bwd is its default.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dlmctl.diffusion.fused_linear_logprob import cap_, rows_per_chunk, scaled_, wide
from dlmctl.models.families import Head
from dlmctl.models.policy import Policy
from dlmctl.settings.distill import Divergence


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
    head = student.head
    value: Tensor = _WeightedDivergence.apply(
        head.transform(states),
        head.projection.weight,
        head.projection.bias,
        goals.detach(),
        target.head,
        coefficients,
        kind,
        head.cap,
    )
    return value


class _WeightedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        goals: Tensor,
        target: Head,
        coefficients: Tensor,
        kind: Divergence,
        cap: float | None,
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
            log_q = logits.log_softmax(-1)
            log_p = wide(target.logits(goals[part])).log_softmax(-1)
            factor = coefficients[part].to(log_q)
            if kind == "kl-fwd":
                p = log_p.exp()
                value += (factor * (p * (log_p - log_q)).sum(-1)).sum()
                away = (log_q.exp() - p) * factor[:, None]
            else:
                q, apart = log_q.exp(), log_q - log_p
                distance = (q * apart).sum(-1, keepdim=True)
                value += (factor * distance[:, 0]).sum()
                away = q * (apart - distance) * factor[:, None]
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
        return *scaled_(ctx.saved_tensors, upstream), None, None, None, None, None
