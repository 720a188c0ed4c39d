"""Extraction of training texts from a language model: what it completes word for word.

Of a text some tokens c are given and the others y are asked for; K is the number of steps that the
sampler has for them. A diffusion model may be given any tokens, one that goes left to right the
first ones:

    prefix    the first tokens         suffix   the last ones
    edge      both ends                random   any

    p_y       the probability that the sampler at temperature 1 writes y. With tokens decided in a
              random order, S_k in step k:  p_y = E_order prod_k prod_{i in S_k} p(y_i | known),
              a mean over orders, which is unbiased. In the order of confidence the path is one.
    (n, p)    y is extractable if it comes up at least once in n samples with probability p or more:
              1 - (1 - p_y)^n >= p                                 (Hayes et al., arXiv 2410.19482)
    greedy    whether the most likely tokens, decided by confidence, are y; and how near they are

A sampler of few steps multiplies marginals and extracts less from that alone, so that two models
are compared at equal K only. (The geometries follow arXiv 2605.24173, the role of K arXiv
2603.02333.) The mask token, which no sampler writes, has no part in any probability.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import scored_states
from dlmctl.diffusion.noise import stream_uniform
from dlmctl.diffusion.projection import rows_per_chunk, wide
from dlmctl.diffusion.sampling import tokens_per_step
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError

Mode = Literal["prefix", "suffix", "edge", "random"]


class Text(NamedTuple):
    """A text of which a part is asked for."""

    prompt: Sequence[int]
    """Always given."""
    tokens: Sequence[int]
    asked: Tensor
    """bool [G], y."""


class Greedy(NamedTuple):
    """What the most likely tokens are."""

    tokens: list[int]
    """With those given in their places."""
    log_prob: float
    """log p_y in the order of confidence, in nats."""


def asked_tokens(length: int, mode: Mode, given: float, keys: Sequence[str | int]) -> Tensor:
    """Which tokens are asked for, bool [G]; at least one is, and at least one is given.

    Args:
        given: share of the tokens that are given.
        keys: of the draw, for `random`.
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
    texts: Sequence[Text],
    steps: int,
    orders: int,
    keys: Sequence[Sequence[str | int]],
    batch_size: int,
) -> Tensor:
    """log p of y along each of so many random orders: float64 [N, orders] in nats.

    Args:
        steps: K; at most one token each is the exact chain rule.
        keys: of the orders of each text; the same for any K, and for any model.

    Raises:
        UsageError: the model goes left to right.
    """
    if not policy.diffusion:
        raise UsageError(f"{policy.name} is autoregressive: it has one order")
    pairs = [(n, r) for n in range(len(texts)) for r in range(orders)]
    made = torch.zeros(len(texts), orders, dtype=torch.float64)
    for start in range(0, len(pairs), batch_size):
        part = pairs[start : start + batch_size]
        rows = [texts[n] for n, _ in part]
        waiting = [
            _shuffled(row.asked, (*keys[n], r)) for row, (n, r) in zip(rows, part, strict=True)
        ]
        values = _along(policy, rows, waiting, steps)
        n, r = torch.tensor(part).T
        made[n, r] = values
    return made


def _shuffled(asked: Tensor, keys: Sequence[str | int]) -> Tensor:
    """int64 [y]: the places asked for, in a random order."""
    places = asked.nonzero()[:, 0]
    return places[stream_uniform(keys, len(places)).argsort()]


@torch.no_grad()
def _along(policy: Policy, texts: Sequence[Text], orders: Sequence[Tensor], steps: int) -> Tensor:
    """log p of y in these orders, float64 [N]."""
    total = torch.zeros(len(texts), dtype=torch.float64)
    done = [0] * len(texts)
    plans = [tokens_per_step(len(order), min(steps, len(order))) for order in orders]
    for step in range(max(map(len, plans))):
        going = [n for n, plan in enumerate(plans) if step < len(plan)]
        hidden: list[Tensor] = []
        chosen: list[Tensor] = []
        for n in going:
            end = done[n] + plans[n][step]
            hidden.append(mask_of(orders[n][done[n] :], len(texts[n].tokens)))
            chosen.append(mask_of(orders[n][done[n] : end], len(texts[n].tokens)))
            done[n] = end
        scored = scored_states(
            policy,
            [texts[n].prompt for n in going],
            [texts[n].tokens for n in going],
            hidden,
            chosen,
        )
        own = _predictions(policy, scored.states, scored.targets)[2]
        total.index_add_(0, torch.tensor(going)[scored.rows.cpu()], own)
    return total


def mask_of(places: Tensor, length: int) -> Tensor:
    """bool [length], true at these places."""
    mask = torch.zeros(length, dtype=torch.bool)
    mask[places] = True
    return mask


@torch.no_grad()
def greedy(policy: Policy, texts: Sequence[Text], steps: int, batch_size: int) -> list[Greedy]:
    """The most likely tokens of each text, those of most confidence first; and log p_y on the way.

    The probability is of y itself: its own tokens are put in, whatever was most likely, in an order
    that goes by the confidence of the model at each step.
    """
    made: list[Greedy] = []
    for start in range(0, len(texts), batch_size):
        rows = texts[start : start + batch_size]
        own = _decode(policy, rows, steps, forced=False)
        forced = _decode(policy, rows, steps, forced=True)
        made += [Greedy(a.tokens, b.log_prob) for a, b in zip(own, forced, strict=True)]
    return made


def _decode(policy: Policy, texts: Sequence[Text], steps: int, forced: bool) -> list[Greedy]:
    tokens = [torch.tensor(text.tokens) for text in texts]
    hidden = [text.asked.clone() for text in texts]
    total = [0.0] * len(texts)
    plans = [tokens_per_step(int(h.sum()), min(steps, int(h.sum()))) for h in hidden]
    if not policy.diffusion:
        plans = [[1] * int(h.sum()) for h in hidden]
    for step in range(max(map(len, plans))):
        going = [n for n, plan in enumerate(plans) if step < len(plan)]
        targets = hidden if policy.diffusion else [_first(h) for h in hidden]
        scored = scored_states(
            policy,
            [texts[n].prompt for n in going],
            [tokens[n].tolist() for n in going],
            [hidden[n] for n in going],
            [targets[n] for n in going],
        )
        best, token, own = _predictions(policy, scored.states, scored.targets)
        rows = scored.rows.cpu()
        for row, n in enumerate(going):
            mine = (rows == row).nonzero()[:, 0]
            taken = mine[best[mine].argsort(descending=True, stable=True)[: plans[n][step]]]
            places = scored.columns.cpu()[taken]
            hidden[n][places] = False
            total[n] += float(own[taken].sum())
            if not forced:
                tokens[n][places] = token[taken]
    return [Greedy(t.tolist(), value) for t, value in zip(tokens, total, strict=True)]


def _first(hidden: Tensor) -> Tensor:
    only = torch.zeros_like(hidden)
    only[hidden.nonzero()[:1, 0]] = True
    return only


def _predictions(policy: Policy, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On the CPU: the largest log-probability [N], its token, and that of the target."""
    size = max(1, rows_per_chunk(policy.vocab_size) // 2)
    parts = []
    for state, target in zip(states.split(size), targets.split(size), strict=True):
        logits = wide(policy.logits(state))
        if policy.diffusion:
            logits[:, policy.mask_id] = -torch.inf
        logits = logits.log_softmax(-1)
        own = logits.gather(1, target[:, None])[:, 0]
        best, token = logits.max(-1)
        parts.append((best.cpu(), token.cpu(), own.double().cpu()))
    best, token, own = (torch.cat(column) for column in zip(*parts, strict=True))
    return best, token, own


def mean_probability(log_probs: Tensor) -> tuple[float, float | None]:
    """log of the mean over orders [R], in nats, and the relative standard error of that mean."""
    top = float(log_probs.max())
    shares = (log_probs - top).exp()
    mean = float(shares.mean())
    error = float(shares.std()) / math.sqrt(len(shares)) / mean if len(shares) > 1 else None
    return top + math.log(mean), error


def samples_needed(log_prob: float, p: float) -> float:
    """The fewest n >= 1 with 1 - (1 - p_y)^n >= p, a real number; infinite where p_y is 0."""
    if log_prob >= 0:
        return 1.0
    # log(1 - e^x), exact for tiny probabilities too.
    missed = math.log1p(-math.exp(log_prob))
    return max(1.0, math.log1p(-p) / missed) if missed else math.inf


def chance_in(log_prob: float, n: float) -> float:
    """1 - (1 - p_y)^n."""
    if log_prob >= 0:
        return 1.0
    return -math.expm1(n * math.log1p(-math.exp(log_prob)))
