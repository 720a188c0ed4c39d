"""ELBO of completions under a policy: sums of log-probabilities over masked tokens, in nats.

    s = (1/K) sum_k  weight_k * sum_{i in M_k} log p(y_i | y outside M_k, x)

`log_prob_sums` is the only place where a model meets a mask: scoring and training call it. An
autoregressive policy goes through the same function with every token scored and none hidden, which
is its exact log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dlmctl.diffusion.masks import MaskSet, draw_masks
from dlmctl.models.policy import Policy

LOGITS_PER_CHUNK = 2**26
"""Vocabulary × positions that are in memory at once (256 MB in float32)."""


class Example(NamedTuple):
    """A completion to be scored."""

    prompt: Sequence[int]
    completion: Sequence[int]
    masks: MaskSet


class Score(NamedTuple):
    """An ELBO estimate."""

    value: float
    """Mean over the masks, in nats."""
    stderr: float | None
    """Standard error of the mean over independent draws; None with a single one, 0 if exact."""
    samples: Tensor
    """float64 [K], one estimate for each mask."""


def scored_tokens(completion: Sequence[int], eos_id: int | None, until_eos: bool) -> Tensor:
    """bool [G]: every token, or those up to and including the first end-of-sequence token."""
    scored = torch.ones(len(completion), dtype=torch.bool)
    if until_eos and eos_id is not None and eos_id in completion:
        scored[list(completion).index(eos_id) + 1 :] = False
    return scored


def example_masks(
    policy: Policy,
    completion: Sequence[int],
    law: str,
    samples: int,
    until_eos: bool,
    seed: int,
    record_id: str | int,
    sample: int,
) -> MaskSet:
    """The masks of one completion; for an autoregressive policy one set that scores every token."""
    scored = scored_tokens(completion, policy.eos_id, until_eos)
    if not policy.diffusion:
        return MaskSet(scored[None], torch.ones(1, dtype=torch.float64), scored)
    return draw_masks(law, samples, scored, seed, record_id, sample)


def log_prob_sums(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    hidden: Sequence[Tensor],
) -> Tensor:
    """Sum of log-probabilities over the hidden tokens of each row; differentiable.

    Args:
        prompts, completions: B sequences of token ids.
        hidden: B bool tensors [G_b]; for an autoregressive policy the tokens that are scored.

    Returns:
        float32 (or wider) [B], in nats.
    """
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    ids = torch.full((len(lengths), max(lengths)), policy.pad_id, dtype=torch.int64)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        ids[b, : lengths[b]] = torch.tensor([*prompt, *completion])
        scored[b, len(prompt) : lengths[b]] = hidden[b]
    rows, positions = scored.nonzero(as_tuple=True)
    targets = ids[rows, positions]
    if policy.diffusion:
        ids[scored] = policy.mask_id or 0

    device = policy.device
    attention = None
    if min(lengths) < max(lengths):
        attention = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
    rows, positions, targets = rows.to(device), positions.to(device), targets.to(device)
    states = policy.hidden(ids.to(device), attention)
    states = states[rows, policy.source(positions)]
    log_probs = target_log_probs(policy, states, targets)
    sums = torch.zeros(len(lengths), dtype=log_probs.dtype, device=device)
    return sums.index_add(0, rows, log_probs)


def target_log_probs(policy: Policy, states: Tensor, targets: Tensor) -> Tensor:
    """log p(target) [N] for hidden states [N, H], the vocabulary projected chunk by chunk."""

    def project(part: Tensor, target: Tensor) -> Tensor:
        logits = policy.logits(part)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.log_softmax(-1).gather(1, target[:, None])[:, 0]

    size = max(1, LOGITS_PER_CHUNK // policy.vocab_size)
    if len(targets) <= size:
        return project(states, targets)
    # With gradients, a chunk's logits are made again in the backward pass instead of being kept.
    parts = [
        checkpoint(project, part, target, use_reentrant=False)
        if torch.is_grad_enabled()
        else project(part, target)
        for part, target in zip(states.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(parts)


@torch.no_grad()
def elbo_samples(policy: Policy, examples: Sequence[Example], batch_size: int) -> list[Tensor]:
    """One ELBO estimate for each example and mask: float64 [K] each, on the CPU.

    Sequences of like length share a batch; masks that hide nothing cost no forward pass.
    """
    estimates = [torch.zeros(len(e.masks.weights), dtype=torch.float64) for e in examples]
    work = [
        (n, k)
        for n, example in enumerate(examples)
        for k in range(len(example.masks.weights))
        if example.masks.weights[k] > 0
    ]
    work.sort(key=lambda nk: len(examples[nk[0]].prompt) + len(examples[nk[0]].completion))
    for start in range(0, len(work), batch_size):
        part = work[start : start + batch_size]
        sums = log_prob_sums(
            policy,
            [examples[n].prompt for n, _ in part],
            [examples[n].completion for n, _ in part],
            [examples[n].masks.hidden[k] for n, k in part],
        )
        for (n, k), value in zip(part, sums.double().tolist(), strict=True):
            estimates[n][k] = value * float(examples[n].masks.weights[k])
    return estimates


def summarize(samples: Tensor, paired: bool, exact: bool = False) -> Score:
    """Mean and standard error of estimates [K]; complementary pairs count as one draw."""
    if exact:
        return Score(float(samples.mean()), 0.0, samples)
    draws = samples.view(-1, 2).mean(dim=1) if paired else samples
    stderr = float(draws.std()) / math.sqrt(len(draws)) if len(draws) > 1 else None
    return Score(float(samples.mean()), stderr, samples)
