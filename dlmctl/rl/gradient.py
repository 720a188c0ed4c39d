"""The gradient of a weighted sum of log-probabilities, one micro-batch after the other.

    grad = sum_{i,k,t} c_ikt grad log p_theta(y_it | y_i outside M_ik, x_i)

Every objective here is a function of these log-probabilities, so that its gradient is this one with
c = the derivative of the loss by each of them, taken first and without the model
(rl/objectives/scores). The graph of one micro-batch is in memory, however many masks there are; if
even that is too large for the device, activations are recomputed from then on.

Under torchrun each rank takes its share of the micro-batches, with the coefficients of the whole
step, and the gradients are summed.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import (
    Example,
    mask_weights,
    masked_rows,
    own_micro_batches,
    scored_states,
)
from dlmctl.diffusion.fused_linear_logprob import weighted_log_prob
from dlmctl.models.allocator import release_cached_memory
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent
from dlmctl.train.activations import checkpoint_activations, checkpoints_activations
from dlmctl.train.distributed import all_reduce_sum, world_size
from dlmctl.train.sharding import full_tensor, whole_pass


def accumulate_gradient(
    policy: Policy, examples: Sequence[Example], coefficients: Tensor, batch_size: int
) -> float:
    """Add the gradient to the parameters' `.grad`; sequences of like length share a micro-batch.

    Args:
        coefficients: float64 [N, K, G], c; rows of zeros cost nothing.

    Returns:
        The value of the weighted sum, in nats.

    Raises:
        torch.OutOfMemoryError: a micro-batch does not fit, even where activations are recomputed.
    """
    untouched = all(parameter.grad is None for parameter in policy.model.parameters())
    try:
        return _accumulate(policy, examples, coefficients, batch_size)
    except torch.OutOfMemoryError:
        # Of several ranks the others are in the midst of a pass that this one has left.
        if not untouched or checkpoints_activations(policy.core) or world_size() > 1:
            raise
    # Out of the handler, which holds the graph that did not fit. Its backward pass may have added
    # a part of a gradient, so that all micro-batches are done again.
    policy.model.zero_grad(set_to_none=True)
    release_cached_memory(policy.device)
    checkpoint_activations(policy.core)
    print(
        "dlmctl: a micro-batch does not fit into memory: activations are recomputed from now on, "
        "as with --gradient-checkpointing (a smaller --batch-size may be faster)",
        file=sys.stderr,
    )
    return _accumulate(policy, examples, coefficients, batch_size)


def compared_gradient(
    policy: Policy,
    examples: Sequence[Example],
    coefficients: Tensor,
    others: Tensor,
    batch_size: int,
) -> tuple[float, float | None]:
    """`accumulate_gradient`, compared with the gradient that other coefficients would have.

    Takes a second backward pass, and memory for a second gradient. No parameter may have a
    gradient yet.

    Returns:
        The value of the weighted sum, in nats, and the cosine of the two gradients; None if one of
        them is 0.
    """
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    accumulate_gradient(policy, examples, others, batch_size)
    other = [p.grad for p in parameters]
    policy.model.zero_grad(set_to_none=True)
    value = accumulate_gradient(policy, examples, coefficients, batch_size)
    sums = torch.zeros(3, dtype=torch.float64)  # of a b, a a and b b
    for parameter, gradient in zip(parameters, other, strict=True):
        if parameter.grad is None or gradient is None:  # both, or neither
            continue
        a, b = full_tensor(parameter.grad).double(), full_tensor(gradient).double()
        sums += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).cpu()
    product = float((sums[1] * sums[2]).sqrt())
    return value, float(sums[0]) / product if product else None


def _accumulate(
    policy: Policy, examples: Sequence[Example], coefficients: Tensor, batch_size: int
) -> float:
    policy.model.train()  # dropout of an adapter and gradient checkpointing act here alone
    value = torch.zeros((), dtype=torch.float64, device=policy.device)
    wanted = (coefficients != 0).any(dim=2) & (mask_weights(examples) > 0)
    lent = _pair_with_images(examples, wanted)
    for pairs, counts in own_micro_batches(examples, wanted, batch_size):
        n, k = torch.tensor(pairs).T
        weights = coefficients[n, k] * counts
        if lent and not any(examples[n].pictures for n, _ in pairs):
            pairs, weights = [*pairs, lent], torch.cat([weights, torch.zeros_like(weights[:1])])
        part = whole_pass(policy.model, functools.partial(_part, policy, examples, pairs, weights))
        part.backward()
        value += part.detach()
    policy.model.eval()
    return float(all_reduce_sum(value.cpu()))


def _pair_with_images(examples: Sequence[Example], wanted: Tensor) -> tuple[int, int] | None:
    """A pair that micro-batches without images are given, where it does not count.

    Of several ranks all must have gradients of the weights that look at images, or none.
    """
    if world_size() == 1:
        return None
    pairs: list[tuple[int, int]] = wanted.nonzero().tolist()
    return next(((n, k) for n, k in pairs if examples[n].pictures), None)


def _part(
    policy: Policy, examples: Sequence[Example], pairs: list[tuple[int, int]], coefficients: Tensor
) -> Tensor:
    """The weighted sum over a micro-batch, for coefficients [B, G] of its pairs."""
    scored = scored_states(policy, *masked_rows(policy, examples, pairs))
    factors = sent(coefficients, policy.device)[scored.rows, scored.columns]
    return weighted_log_prob(policy, scored.states, scored.targets, factors)


def elbo_coefficients(examples: Sequence[Example], coefficients: Tensor) -> Tensor:
    """c [N, K, G] of a weighted sum of ELBO scores, for the weight [N] of each."""
    weights = mask_weights(examples)
    width = max(len(example.completion) for example in examples)
    per_mask = coefficients[:, None] * weights / weights.shape[1]
    return per_mask[:, :, None].expand(-1, -1, width)
