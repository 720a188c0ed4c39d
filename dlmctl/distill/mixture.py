"""The likelihood of what a step decides, by a student with a latent variable.

A student with C mask tokens (models/latent_masks) that decides the tokens A = M_t \\ M_s of a
completion y in one step minimizes

    L = - E (1/|A|) log (1/C) sum_c exp(l_c),    l_c = sum_{i in A} log p(y_i | z_t, mask token c)

With completions that the teacher sampled in many steps, E -log p(y_A | z_t) is smallest where the
student's joint distribution of the tokens is the teacher's: no product of distributions gets there
if they depend on each other, and the mixture comes as near as log C nats allow. Tokens of M_s are
left to other draws, as a later step of the sampler sees what this one has decided.

The gradient is that of sum_c r_c l_c with r = softmax(l), the posterior of the latent variable. How
far it is used says I = log C - H(r), the mean over completions: 0 if all components are alike.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import own_parts, scored_states
from dlmctl.diffusion.fused_linear_logprob import target_log_probs, weighted_log_prob
from dlmctl.distill.nested_masks import NestedExample
from dlmctl.models.policy import Policy
from dlmctl.train.distributed import all_reduce_sum
from dlmctl.train.sharding import whole_pass


def mixture_gradient(
    student: Policy, examples: Sequence[NestedExample], batch_size: int
) -> dict[str, float]:
    """Accumulate the gradient of L, the mean over the examples; each rank that of its share.

    Returns:
        loss, in nats per token, and latent_nats, I.
    """
    ordered = sorted(examples, key=lambda example: len(example.prompt) + len(example.completion))
    rows = max(1, batch_size // len(student.latent_masks))
    sums = torch.zeros(2, dtype=torch.float64, device=student.device)
    student.model.train()
    for part, counts in own_parts(ordered, rows):
        run = functools.partial(_losses, student, part, counts / len(examples))
        loss, used = whole_pass(student.model, run)
        loss.backward()
        sums += torch.stack([loss.detach(), used])
    student.model.eval()
    loss, used = all_reduce_sum(sums.cpu()).tolist()
    return {"loss": loss, "latent_nats": used}


def _losses(
    student: Policy, examples: Sequence[NestedExample], share: float
) -> tuple[Tensor, Tensor]:
    """L and I of a micro-batch, each completion with this share in the mean; L with gradient."""
    latents, count = student.latent_masks, len(examples)
    components = len(latents)
    # The rows of a completion, one for each mask token, are neighbours.
    rows = [example for example in examples for _ in latents]
    scored = scored_states(
        student,
        [row.prompt for row in rows],
        [row.completion for row in rows],
        [row.masks.at_t for row in rows],
        [row.masks.decided for row in rows],
        mask_ids=latents * count,
    )
    values = target_log_probs(student, scored.states.detach(), scored.targets)
    likelihoods = values.new_zeros(count * components).index_add(0, scored.rows, values)
    table = likelihoods.view(count, components).double()  # l, [B, C]
    decided = torch.tensor([int(e.masks.decided.sum()) for e in examples], device=table.device)
    weights = share / decided.double()  # [B]
    loss = -(weights * (table.logsumexp(dim=1) - math.log(components))).sum()
    posterior = table.softmax(dim=1)  # r
    coefficients = -(weights[:, None] * posterior).flatten()[scored.rows]
    surrogate = weighted_log_prob(student, scored.states, scored.targets, coefficients)
    entropy = torch.special.entr(posterior).sum(dim=1)
    used = share * (math.log(components) - entropy).sum()
    return surrogate + (loss - surrogate.detach()), used
