"""Mask laws of the ELBO: which completion tokens are hidden, and with what weight.

For a completion of L scored tokens, S(M) = sum over i in M of log p(y_i | y outside M, x), and

    ELBO = sum_{l=1..L} (1/l) E[S(M) : M uniform among the subsets of size l]       (nats)

which is LLaDA's E_t[(1/t) S(M_t)] with every token hidden with probability t ~ U(0, 1), since
integrating (1/t) t^l (1-t)^(L-l) C(L,l) over t gives 1/l. Every law below has this expectation:

    independent    t ~ U(0,1), each token hidden with probability t            weight 1/t
    uniform        l ~ U{1..L}, M uniform of size l                            weight L/l
    complementary  l ~ U{0..L}, M uniform of size l, then its complement       weight (L+1)/|M|

(LLaDA, arXiv 2502.09992, equations 3, 6 and 14; coupled pairs with the weight (L+1)/l as in ESPO,
arXiv 2512.03759.) Masks are a pure function of (seed, record id, sample), so that two processes
score the same ones.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError

Law = Literal["independent", "uniform", "complementary"]
LAWS: tuple[str, ...] = get_args(Law)


class MaskSet(NamedTuple):
    """K masks of one completion."""

    hidden: Tensor
    """bool [K, G], true where a token is replaced by the mask token."""
    weights: Tensor
    """float64 [K]; weight of S(M_k), 0 where nothing is hidden."""
    scored: Tensor
    """bool [G], the tokens that count."""


def draw_masks(
    law: str, samples: int, scored: Tensor, seed: int, record_id: str | int, sample: int
) -> MaskSet:
    """Draw `samples` masks over the scored tokens of one completion.

    Args:
        scored: bool [G], the tokens that count; the others are never hidden.

    Raises:
        UsageError: an unknown law, or an odd number of samples for complementary pairs.
    """
    if law not in LAWS:
        raise UsageError(f"unknown mask law '{law}'; there are {', '.join(LAWS)}")
    if law == "complementary" and samples % 2:
        raise UsageError(f"complementary masks come in pairs; {samples} samples is odd")
    length = int(scored.sum())
    draws = samples // 2 if law == "complementary" else samples
    keys = key_tensor([stream_key(seed, record_id, sample, k) for k in range(draws)])
    numbers = uniform(keys[:, None], torch.arange(length + 1)[None])
    level, order = numbers[:, 0], numbers[:, 1:]

    if law == "independent":
        hidden, weights = order < level[:, None], 1 / level
    else:
        # `order` ranks the tokens at random; the first l of the ranking are hidden.
        ranks = order.argsort(dim=1).argsort(dim=1)
        if law == "uniform":
            counts = 1 + (level * length).long()
            hidden, weights = ranks < counts[:, None], length / counts.double()
        else:
            counts = (level * (length + 1)).long()
            first = ranks < counts[:, None]
            hidden = torch.stack([first, ~first], dim=1).flatten(0, 1)
            weights = (length + 1) / hidden.sum(dim=1).double()
    weights = torch.where(hidden.any(dim=1), weights, torch.zeros_like(weights))

    full = torch.zeros(samples, scored.numel(), dtype=torch.bool)
    full[:, scored] = hidden
    return MaskSet(full, weights, scored)
