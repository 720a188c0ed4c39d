"""Extraction of training texts from a language model: what it completes verbatim.

Some tokens c of a text are given and the others, y, are asked for; K is the number of steps that
the sampler takes for them. A diffusion model may be given any tokens, an autoregressive one only
the first:

    prefix    the first tokens         suffix   the last tokens
    edge      both ends                random   any tokens

    p_y       the probability that the sampler at temperature 1 writes y. If tokens are decided in a
              random order, S_k in step k:  p_y = E_order prod_k prod_{i in S_k} p(y_i | known),
              estimated without bias by a mean over orders. The order of confidence is a single one.
    (n, p)    y is extractable if it is sampled at least once in n samples with probability p or
              more:  1 - (1 - p_y)^n >= p                          (Hayes et al., arXiv 2410.19482)
    greedy    whether the most likely tokens, decided by confidence, are y; and how similar they are

A sampler of few steps multiplies marginals and extracts less for that reason alone, so that two
models should be compared at equal K only. (The geometries follow arXiv 2605.24173, the role of K
arXiv 2603.02333.) The mask token, which no sampler writes, has no part in any probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import scored_states
from dlmctl.diffusion.fused_linear_logprob import rows_per_chunk, wide
from dlmctl.diffusion.noise import stream_uniform
from dlmctl.diffusion.sampling import tokens_per_step
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.settings.memorization import Mode


class PartialText(NamedTuple):
    """A text of which a part is asked for."""

    prompt: Sequence[int]
    """Always given."""
    tokens: Sequence[int]
    asked: Tensor
    """bool [G], y."""


class Greedy(NamedTuple):
    """The result of greedy decoding."""

    tokens: list[int]
    """All tokens of the text, with the given ones in their places."""
    log_prob: float
    """log p_y in the order of confidence, in nats."""


def asked_tokens(length: int, mode: Mode, given: float, keys: Sequence[str | int]) -> Tensor:
    """Which tokens are asked for, bool [G]; at least one is asked for and one given.

    Args:
        given: share of the tokens that is given.
        keys: of the random numbers, for `random`.
    """
    count = min(max(round(given * length), 1), length - 1)
    place = torch.arange(length)
    if mode == "prefix":
        return place >= count
    if mode == "suffix":
        return place < length - count
    if mode == "edge":
        first = (count + 1) // 2
        return (place >= first) & (place < length - (count - first))
    return stream_uniform(keys, length).argsort().argsort() >= count


def random_order_log_probs(
    policy: Policy,
    texts: Sequence[PartialText],
    steps: int,
    orders: int,
    keys: Sequence[Sequence[str | int]],
    batch_size: int,
) -> Tensor:
    """log p of y along each of several random orders: float64 [N, orders] in nats.

    Args:
        steps: K; with one token per step this is the exact chain rule.
        keys: of the orders of each text; the same for every K and every model.

    Raises:
        UsageError: the model is autoregressive or block-causal.
    """
    if not policy.diffusion:
        raise UsageError(f"{policy.name} is autoregressive: it has one order")
    _check_sight(policy)
    pairs = [(n, r) for n in range(len(texts)) for r in range(orders)]
    log_probs = torch.zeros(len(texts), orders, dtype=torch.float64)
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        shuffled = []
        for n, r in part:
            places = texts[n].asked.nonzero()[:, 0]  # [y]
            shuffled.append(places[stream_uniform((*keys[n], r), len(places)).argsort()])
        n, r = torch.tensor(part).T
        log_probs[n, r] = _along(policy, [texts[n] for n, _ in part], shuffled, steps)
    return log_probs


@torch.no_grad()
def _along(
    policy: Policy, texts: Sequence[PartialText], orders: Sequence[Tensor], steps: int
) -> Tensor:
    """log p of y in these orders, float64 [N]; orders int64 [y] each."""
    total = torch.zeros(len(texts), dtype=torch.float64)
    done = [0] * len(texts)
    plans = [tokens_per_step(len(order), min(steps, len(order))) for order in orders]
    for step in range(max(map(len, plans))):
        active = [n for n, plan in enumerate(plans) if step < len(plan)]
        masked: list[Tensor] = []
        decided: list[Tensor] = []
        for n in active:
            end = done[n] + plans[n][step]
            masked.append(mask_of(orders[n][done[n] :], len(texts[n].tokens)))
            decided.append(mask_of(orders[n][done[n] : end], len(texts[n].tokens)))
            done[n] = end
        scored = scored_states(
            policy,
            [texts[n].prompt for n in active],
            [texts[n].tokens for n in active],
            masked,
            decided,
        )
        log_probs = _predictions(policy, scored.states, scored.targets)[2]
        total.index_add_(0, torch.tensor(active)[scored.rows.cpu()], log_probs)
    return total


def _check_sight(policy: Policy) -> None:
    """Raise UsageError for a model that is scored after a past that must be known."""
    if policy.blocks is not None:
        raise UsageError(
            f"{policy.name} is block-causal: it sees nothing that is given behind a block, and "
            "extraction is for models that attend to the whole text, or from left to right"
        )


def mask_of(places: Tensor, length: int) -> Tensor:
    """bool [length], true at the places, int64 [k]."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[places] = True
    return mask


@torch.no_grad()
def greedy(
    policy: Policy, texts: Sequence[PartialText], steps: int, batch_size: int
) -> list[Greedy]:
    """The most likely tokens of each text, decided by confidence; and log p_y in that order.

    The probability is that of y: whatever is most likely, the tokens of y are put in, in the order
    of the model's confidence at each step.

    Raises:
        UsageError: the model is block-causal.
    """
    _check_sight(policy)
    results: list[Greedy] = []
    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        free = _decode(policy, rows, steps, forced=False)
        forced = _decode(policy, rows, steps, forced=True)
        results += [Greedy(a.tokens, b.log_prob) for a, b in zip(free, forced, strict=True)]
    return results


def _decode(policy: Policy, texts: Sequence[PartialText], steps: int, forced: bool) -> list[Greedy]:
    """Greedy decoding; if `forced`, with the tokens of y in place of the most likely ones."""
    tokens = [torch.tensor(text.tokens) for text in texts]
    masked = [text.asked.clone() for text in texts]
    total = [0.0] * len(texts)
    plans = [tokens_per_step(int(m.sum()), min(steps, int(m.sum()))) for m in masked]
    if not policy.diffusion:
        plans = [[1] * int(m.sum()) for m in masked]
    for step in range(max(map(len, plans))):
        active = [n for n, plan in enumerate(plans) if step < len(plan)]
        targets = masked
        if not policy.diffusion:
            targets = [mask_of(m.nonzero()[:1, 0], len(m)) for m in masked]
        scored = scored_states(
            policy,
            [texts[n].prompt for n in active],
            [tokens[n].tolist() for n in active],
            [masked[n] for n in active],
            [targets[n] for n in active],
        )
        best, token, log_probs = _predictions(policy, scored.states, scored.targets)
        rows = scored.rows.cpu()
        for row, n in enumerate(active):
            of_row = (rows == row).nonzero()[:, 0]
            taken = of_row[best[of_row].argsort(descending=True, stable=True)[: plans[n][step]]]
            places = scored.columns.cpu()[taken]
            masked[n][places] = False
            total[n] += float(log_probs[taken].sum())
            if not forced:
                tokens[n][places] = token[taken]
    return [Greedy(t.tolist(), value) for t, value in zip(tokens, total, strict=True)]


def _predictions(policy: Policy, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU: the largest log-probability [N], its token, and that of the target."""
    size = max(1, rows_per_chunk(policy.vocab_size) // 2)
    parts = []
    for state, target in zip(states.split(size), targets.split(size), strict=True):
        logits = wide(policy.logits(state))
        if policy.diffusion:
            logits[:, policy.mask_id] = -torch.inf
        logits = logits.log_softmax(-1)
        log_prob = logits.gather(1, target[:, None])[:, 0]
        best, token = logits.max(-1)
        parts.append((best.cpu(), token.cpu(), log_prob.double().cpu()))
    best, token, log_prob = (torch.cat(column) for column in zip(*parts, strict=True))
    return best, token, log_prob


def mean_probability(log_probs: Tensor) -> tuple[float, float | None]:
    """log of the mean probability over orders [R], in nats, and that mean's relative standard
    error, which is None for one order."""
    top = float(log_probs.max())
    shares = (log_probs - top).exp()
    mean = float(shares.mean())
    error = float(shares.std()) / math.sqrt(len(shares)) / mean if len(shares) > 1 else None
    return top + math.log(mean), error


def samples_needed(log_prob: float, p: float) -> float:
    """The least real n >= 1 with 1 - (1 - p_y)^n >= p; infinite if p_y is 0."""
    if log_prob >= 0:
        return 1.0
    missed = math.log1p(-math.exp(log_prob))  # log(1 - p_y), exact for tiny probabilities too
    return max(1.0, math.log1p(-p) / missed) if missed else math.inf


def chance_in(log_prob: float, n: float) -> float:
    """1 - (1 - p_y)^n."""
    if log_prob >= 0:
        return 1.0
    return -math.expm1(n * math.log1p(-math.exp(log_prob)))
