"""A latent variable of a masked diffusion model: several mask tokens, of which each pass has one.

A pass decides its tokens independently of each other, so that a model of few steps cannot give
several right answers without mixing them: what it loses is their total correlation, whatever it
learns. With C mask tokens, one of which stands for all that is masked in a row, it is a mixture,

    p(y_A | z) = (1/C) sum_c prod_{i in A} p(y_i | z with mask token c),

whose components are independent and whose sum is not (mixtures of product distributions: Di4C,
arXiv 2410.08709; that the latent variable enters through the mask token is ours). Nothing else
changes: the vocabulary has C - 1 more rows, which are never sampled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

SPREAD = 1.0
"""Length of what is added to the embedding of a new mask token, as a share of its length. Equal
ones would stay equal: their gradients are."""


def with_latent_masks(policy: Policy, count: int, seed: int) -> Policy:
    """The policy with this many mask tokens; it is changed in place.

    New ones have the embedding of the mask token and noise of the seed. With the first the model
    predicts what it did before.

    Raises:
        UsageError: it does not denoise, has several already, is block-causal, or has an adapter.
    """
    model: Any = policy.model
    if not policy.diffusion or policy.mask_id is None:
        raise UsageError(f"{policy.name} is autoregressive, and has no mask token")
    policy.check_one_mask()
    if policy.blocks is not None:
        raise UsageError(f"{policy.name} is block-causal: it reuses what was computed of a mask")
    if hasattr(model, "peft_config"):
        raise UsageError(f"{policy.name} has an adapter: merge it first with 'dlmctl merge'")
    size = policy.vocab_size
    kept = model.get_output_embeddings().weight[policy.mask_id].detach().clone()
    model.resize_token_embeddings(size + count - 1, mean_resizing=False)
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        mask = table[policy.mask_id]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count - 1, len(mask), generator=generator).to(table)
        scale = SPREAD * mask.norm() / noise.norm(dim=1, keepdim=True)
        if (head := model.get_output_embeddings()).weight is not table:
            head.weight[size:] = kept
        table[size:] = mask + scale * noise
    return replace(
        policy,
        vocab_size=size + count - 1,
        latent_masks=(policy.mask_id, *range(size, size + count - 1)),
    )
