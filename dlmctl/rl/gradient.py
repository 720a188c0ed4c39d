"""The gradient of a weighted sum of ELBO scores, one mask after the other.

    grad = sum_i c_i (1/K) sum_k weight_ik grad S_theta(y_i; M_ik)

Every objective whose gradient is linear in the per-mask scores ends here with its own c_i: RSPO and
REINFORCE with -w_i / N, supervised fine-tuning with -1 / (N L_i). Memory holds one micro-batch of
one mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import Example, log_prob_sums
from dlmctl.models.policy import Policy


def accumulate_gradient(
    policy: Policy, examples: Sequence[Example], coefficients: Tensor, batch_size: int
) -> float:
    """Add the gradient to the parameters' `.grad`; sequences of like length share a micro-batch.

    Args:
        coefficients: float64 [N], c_i.

    Returns:
        The value of the weighted sum, sum_i c_i s_i, with s_i in nats.
    """
    policy.model.train()  # dropout of an adapter and gradient checkpointing act here alone
    total = 0.0
    by_length = sorted(
        range(len(examples)), key=lambda n: len(examples[n].prompt) + len(examples[n].completion)
    )
    for k in range(max(len(example.masks.weights) for example in examples)):
        rows = [n for n in by_length if coefficients[n] != 0 and _weight(examples[n], k) > 0]
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            sums = log_prob_sums(
                policy,
                [examples[n].prompt for n in part],
                [examples[n].completion for n in part],
                [examples[n].masks.hidden[k] for n in part],
            )
            factors = [float(coefficients[n]) * _weight(examples[n], k) for n in part]
            value = (torch.tensor(factors, dtype=sums.dtype, device=sums.device) * sums).sum()
            value.backward()
            total += float(value.detach())
    policy.model.eval()
    return total


def _weight(example: Example, k: int) -> float:
    """weight_ik / K, and 0 where the mask is missing or hides nothing."""
    weights = example.masks.weights
    return float(weights[k]) / len(weights) if k < len(weights) else 0.0
