"""Supervised fine-tuning of a masked diffusion model: cross-entropy on the masked tokens.

    L = -(1/N) sum_i (1/L_i) (1/K) sum_k weight_ik S_theta(y_i; M_ik)

an upper bound on the negative log-likelihood per token, in nats (LLaDA, arXiv 2502.09992, equation
5). Completions may be filled up with end-of-sequence, from which the model learns to end. For an
autoregressive model it is the cross-entropy of every token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from dlmctl.diffusion.annealing import open_share, opened
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.gradient import accumulate_gradient, elbo_coefficients
from dlmctl.settings.masks import Fill


def supervised_gradient(
    policy: Policy,
    records: Sequence[Record],
    plan: MaskPlan,
    step: int,
    batch_size: int,
    anneal_attention: int | None = None,
) -> dict[str, Any]:
    """Accumulate the gradient of a batch; every step draws masks of its own.

    Args:
        anneal_attention: number of steps over which attention is opened; None: it is open.
    """
    seen = {}
    if anneal_attention is not None:
        seen["attention_open"] = share = open_share(step, anneal_attention)
        policy = dataclasses.replace(policy, narrowing=opened(share, plan.seed, step))
    plan = dataclasses.replace(plan, seed=plan.seed + step)
    examples = [example_of(record, policy, plan) for record in records]
    lengths = torch.tensor([float(e.masks.scored.sum()) for e in examples], dtype=torch.float64)
    coefficients = elbo_coefficients(examples, -1 / (lengths.clamp(min=1) * len(records)))
    return {"loss": accumulate_gradient(policy, examples, coefficients, batch_size), **seen}


def with_completion_ids(record: Record, policy: Policy, fill: Fill | None) -> Record:
    """The record with its completion's ids, filled with end-of-sequence.

    For an autoregressive model, which learns to end from the first of them, with one.

    Raises:
        DataError: the tokenizer cannot express it.
        UsageError: the completion does not fit, or the model has no end-of-sequence token.
    """
    ids = policy.encode_completion(record)
    if fill is not None:
        if policy.eos_id is None:
            raise UsageError("--fill-to needs a model with an end-of-sequence token")
        room = fill.room(len(ids))
        if room < 0:
            raise UsageError(
                f"{record.where}: the completion has {len(ids)} tokens, --fill-to is "
                f"{fill.length}; --fill-to x{fill.length} goes on to a multiple of it"
            )
        # One is enough for a model that stops there.
        ids = [*ids, *[policy.eos_id] * (room if policy.diffusion else min(room, 1))]
    done = Record(record)
    done.where = record.where
    done["tokens"] = {"prompt": policy.encode(record), "completion": ids}
    return done
