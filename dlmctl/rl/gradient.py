"""The gradient of a weighted sum of log-probabilities, one micro-batch after the other.

    grad = sum_{i,k,t} c_ikt grad log p_theta(y_it | y_i outside M_ik, x_i)

Every objective here is a function of these log-probabilities, so that its gradient is this one with
c = the derivative of the loss by each of them, taken first and without the model (rl/scores). The
graph of one micro-batch is in memory, however many masks there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import (
    Example,
    mask_weights,
    masked_rows,
    micro_batches,
    scored_states,
)
from dlmctl.diffusion.projection import weighted_log_prob
from dlmctl.models.policy import Policy


def accumulate_gradient(
    policy: Policy, examples: Sequence[Example], coefficients: Tensor, batch_size: int
) -> float:
    """Add the gradient to the parameters' `.grad`; sequences of like length share a micro-batch.

    Args:
        coefficients: float64 [N, K, G], c; rows of zeros cost nothing.

    Returns:
        The value of the weighted sum, in nats.
    """
    policy.model.train()  # dropout of an adapter and gradient checkpointing act here alone
    total = 0.0
    wanted = (coefficients != 0).any(dim=2) & (mask_weights(examples) > 0)
    for pairs in micro_batches(examples, wanted, batch_size):
        scored = scored_states(policy, *masked_rows(policy, examples, pairs))
        n, k = torch.tensor(pairs).T
        factors = coefficients[n, k][scored.rows.cpu(), scored.columns.cpu()]
        value = weighted_log_prob(policy, scored.states, scored.targets, factors.to(policy.device))
        value.backward()
        total += float(value.detach())
    policy.model.eval()
    return total


def elbo_coefficients(examples: Sequence[Example], coefficients: Tensor) -> Tensor:
    """c [N, K, G] of a weighted sum of ELBO scores, for the weight [N] of each."""
    weights = mask_weights(examples)
    width = max(len(example.completion) for example in examples)
    per_mask = coefficients[:, None] * weights / weights.shape[1]
    return per_mask[:, :, None].expand(-1, -1, width)
