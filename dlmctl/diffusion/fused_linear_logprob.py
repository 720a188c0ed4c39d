"""From hidden states to log-probabilities of given tokens, without the logits of a whole batch.

A vocabulary of 126,464 times 512 positions is 259 MB of logits for each sequence, and a plain
implementation holds four such tables: logits, their log-softmax, and the gradients of both. Here
a few rows of one table are in memory at a time, and are overwritten in place.

`weighted_log_prob` knows the coefficient of each log-probability in advance, so it computes the
gradient of a chunk while its logits exist: three matrix products, where recomputing the logits in
the backward pass would need four.

N positions, hidden size H, vocabulary V, C positions in a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from dlmctl.models.even_shapes import even_size
from dlmctl.models.policy import Policy

LOGITS_PER_CHUNK = 2**25
"""V × C: 128 MB in float32."""


@torch.no_grad()
def target_log_probs(policy: Policy, states: Tensor, targets: Tensor) -> Tensor:
    """log p(target), float32 (or wider) [N] in nats.

    Args:
        states: hidden states [N, H].
        targets: int64 [N].
    """
    head = policy.head
    rows = rows_per_chunk(policy.vocab_size)
    states = head.transform(states)
    parts = [
        _chosen_and_total_(head.capped(wide(head.projection(part))), target)[0]
        for part, target in zip(states.split(rows), targets.split(rows), strict=True)
    ]
    return torch.cat(parts) if parts else states.new_zeros(0)


@torch.no_grad()
def divergence(policy: Policy, first: Tensor, second: Tensor) -> Tensor:
    """KL(p || q) of the predicted distributions, float32 (or wider) [N] in nats.

    Args:
        first, second: hidden states [N, H] that predict p and q.
    """
    head = policy.head
    rows = max(1, rows_per_chunk(policy.vocab_size) // 2)
    parts = []
    for one, two in zip(first.split(rows), second.split(rows), strict=True):
        p = wide(head.logits(one)).log_softmax(-1)
        q = wide(head.logits(two)).log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts) if parts else first.new_zeros(0)


def weighted_log_prob(
    policy: Policy, states: Tensor, targets: Tensor, coefficients: Tensor
) -> Tensor:
    """sum_n c_n log p(target_n), a scalar in nats, with gradient by states and weights.

    Args:
        states: hidden states [N, H].
        targets: int64 [N].
        coefficients: float [N], c; taken as constants.
    """
    head = policy.head
    # Further positions, with coefficients of 0.
    more = even_size(len(targets), states.device, states.dtype) - len(targets)
    states = functional.pad(states, (0, 0, 0, more))
    targets, coefficients = (functional.pad(each, (0, more)) for each in (targets, coefficients))
    value: Tensor = _WeightedLogProb.apply(
        head.transform(states),
        head.projection.weight,
        head.projection.bias,
        targets,
        coefficients,
        head.cap,
    )
    return value


def rows_per_chunk(vocab_size: int) -> int:
    """C, the positions whose logits are in memory at once."""
    return max(1, LOGITS_PER_CHUNK // vocab_size)


class _WeightedLogProb(torch.autograd.Function):
    """d/dz of c log softmax(z)[y] is c (onehot(y) - softmax(z))."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients: Tensor,
        cap: float | None,
    ) -> Tensor:
        # The gradients are computed here, with an upstream gradient of 1; backward scales them.
        by_states, by_weight, by_bias = ctx.needs_input_grad[:3]
        compute = _compute_dtype(states)
        matrix = weight.to(compute)
        d_states = torch.zeros_like(states) if by_states else None
        d_weight = torch.zeros_like(weight) if by_weight else None
        d_bias = torch.zeros_like(bias) if bias is not None and by_bias else None
        value = states.new_zeros((), dtype=torch.float64)
        size = rows_per_chunk(len(weight))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            rows, target = states[part].to(compute), targets[part]  # [C, H], [C]
            # 1. Logits, then in place exp(logits - max), of which `total` is the sum.
            logits = wide(functional.linear(rows, matrix, None if bias is None else bias.to(rows)))
            slope = None if cap is None else cap_(logits, cap)  # [C, V]
            factor = coefficients[part].to(logits)  # [C]
            log_prob, total = _chosen_and_total_(logits, target)  # [C], [C]
            value += (factor * log_prob).sum()
            # 2. d/dlogits = c (onehot(y) - softmax), in the same memory.
            d_logits = logits.mul_((-factor / total)[:, None])  # [C, V]
            d_logits[torch.arange(len(target), device=d_logits.device), target] += factor
            if slope is not None:
                d_logits.mul_(slope)
            # 3. On to bias [V], states [N, H] and weight [V, H].
            if d_bias is not None:
                d_bias += d_logits.sum(0).to(d_bias)
            d_logits = d_logits.to(compute)
            if d_states is not None:
                d_states[part] = d_logits @ matrix
            if d_weight is not None and d_weight.dtype == compute:
                d_weight.addmm_(d_logits.T, rows)
            elif d_weight is not None:
                d_weight += d_logits.T @ rows
        ctx.save_for_backward(d_states, d_weight, d_bias)
        return value.to(wide(states).dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return *scaled_(ctx.saved_tensors, upstream), None, None, None


def scaled_(gradients: Sequence[Tensor | None], upstream: Tensor) -> list[Tensor | None]:
    """Gradients, which were computed with an upstream gradient of 1, with this one; in place."""
    # It is 1 if the loss is the sum itself, but the host would have to wait for a GPU to know.
    one = upstream.device.type == "cpu" and float(upstream) == 1
    return [d if d is None or one else d.mul_(upstream) for d in gradients]


def cap_(projected: Tensor, cap: float) -> Tensor:
    """Replace z by c tanh(z / c), and return the derivative of that, 1 - tanh(z / c)^2."""
    bounded = projected.div_(cap).tanh_()
    slope = 1 - bounded.square()
    bounded.mul_(cap)
    return slope


def _chosen_and_total_(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """log p(target) [C] and a total [C]; the logits [C, V] become probabilities times the total."""
    logits -= logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, targets[:, None])[:, 0]  # [C]
    total = logits.exp_().sum(-1)  # [C]
    return chosen - total.log(), total


def wide(values: Tensor) -> Tensor:
    """In float32 at least."""
    return values if values.dtype == torch.float64 else values.float()


def _compute_dtype(states: Tensor) -> torch.dtype:
    """The dtype in which a matrix product of these states is computed."""
    kind = states.device.type
    if torch.is_autocast_enabled(kind) and states.dtype == torch.float32:
        return torch.get_autocast_dtype(kind)
    return states.dtype
