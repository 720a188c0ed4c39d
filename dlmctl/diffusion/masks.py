"""Mask laws of the ELBO: which completion tokens are hidden, and with what weight.

For a completion of L scored tokens, S(M) = sum over i in M of log p(y_i | y outside M, x), and

    ELBO = sum_{l=1..L} (1/l) E[S(M) : M uniform among the subsets of size l]       (nats)

which is LLaDA's E_t[(1/t) S(M_t)] with every token hidden with probability t ~ U(0, 1), since
integrating (1/t) t^l (1-t)^(L-l) C(L,l) over t gives 1/l. These laws have this expectation:

    independent    t ~ U(0,1), each token hidden with probability t            weight 1/t
    uniform        l ~ U{1..L}, M uniform of size l                            weight L/l
    complementary  l ~ U{0..L}, M uniform of size l, then its complement       weight (L+1)/|M|
    stratified     complementary pairs whose levels l are spread evenly over the masks of a
                   completion and, turned by the golden ratio, over the samples of its prompt

(LLaDA, arXiv 2502.09992, equations 3, 6 and 14; coupled pairs with the weight (L+1)/l as in ESPO,
arXiv 2512.03759.) And these have another one, for the algorithms that are made with them:

    quadrature     t at the K nodes of Gauss-Legendre on (0,1), weight K w_k/t_k: little variance,
                   and the bias of quadrature with few nodes (GDPO, arXiv 2510.08554)
    block          a block drawn among those that hold scored tokens is hidden in part, the blocks
                   behind it whole, those before it not; weight L/|M|, so that the score per token
                   is a mean over the hidden tokens (SPG, arXiv 2510.09541)
    full           everything is hidden: the mean-field score of d1 (arXiv 2504.12216)

With a range [a, b] of levels t is U(a, b), or the nodes lie there, with the same weights 1/t: the
part of the bound between two noise levels, divided by b - a. Training on it has less variance (the
clipped schedules of BD3-LM, arXiv 2503.09573).

Under `block` and `full` tokens that are not scored are hidden too. Prompt tokens are hidden on
request. Masks are a pure function of the names that identify a completion, so that two processes
score the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError

Law = Literal[
    "independent", "uniform", "complementary", "stratified", "quadrature", "block", "full"
]
LAWS: tuple[str, ...] = get_args(Law)
UNBIASED: tuple[Law, ...] = ("independent", "uniform", "complementary", "stratified")
PAIRED = frozenset({"complementary", "stratified"})
"""Laws whose masks come as a mask and its complement."""

LEVELLED: tuple[Law, ...] = ("independent", "quadrature")
"""Laws that draw a level t."""

GOLDEN_RATIO = 0.6180339887498949


class MaskSet(NamedTuple):
    """K masks of one completion."""

    hidden: Tensor
    """bool [K, G], true where a token is replaced by the mask token."""
    weights: Tensor
    """float64 [K]; weight of S(M_k), 0 where nothing is hidden."""
    scored: Tensor
    """bool [G], the tokens that count."""
    prompt_hidden: Tensor | None = None
    """bool [K, P], prompt tokens that are replaced too."""

    @property
    def targets(self) -> Tensor:
        """bool [K, G], the tokens whose log-probability is taken."""
        return self.hidden & self.scored


class _Draw(NamedTuple):
    """What a law sees of a completion."""

    samples: int
    scored: Tensor
    keys: tuple[str | int, ...]
    sample: int
    block_length: int
    levels: tuple[float, float]

    @property
    def length(self) -> int:
        return int(self.scored.sum())

    def numbers(self, draws: int, width: int) -> Tensor:
        """Uniform numbers [draws, width]; draw k has them from a key of its own."""
        keys = key_tensor([stream_key(*self.keys, self.sample, k) for k in range(draws)])
        return uniform(keys[:, None], torch.arange(width)[None])

    def between(self, share: Tensor) -> Tensor:
        """Levels at these shares, in [0, 1], of the range."""
        least, greatest = self.levels
        return least + (greatest - least) * share

    def spread(self, hidden: Tensor) -> Tensor:
        """Masks [K, L] over the scored tokens as masks [K, G] over all of them."""
        full = torch.zeros(len(hidden), self.scored.numel(), dtype=torch.bool)
        full[:, self.scored] = hidden
        return full


def draw_masks(
    law: str,
    samples: int,
    scored: Tensor,
    keys: Sequence[str | int],
    sample: int,
    block_length: int = 32,
    prompt_length: int = 0,
    prompt_mask: float = 0.0,
    levels: tuple[float, float] = (0.0, 1.0),
) -> MaskSet:
    """Draw `samples` masks over one completion.

    Args:
        scored: bool [G], the tokens that count.
        keys: names of the draw that the samples of a prompt share: seed, record id.
        sample: which of the samples of the prompt it is.
        block_length: length of a block, for `block`.
        prompt_length: P, tokens of the prompt.
        prompt_mask: probability that a prompt token is hidden.
        levels: range of t, for the laws that draw one.

    Raises:
        UsageError: an unknown law, a range for one that draws no t, or an odd number of samples for
            complementary pairs.
    """
    if law not in LAWS:
        raise UsageError(f"unknown mask law '{law}'; there are {', '.join(LAWS)}")
    if law in PAIRED and samples % 2:
        raise UsageError(f"{law} masks come in pairs; {samples} samples is odd")
    if levels != (0.0, 1.0) and law not in LEVELLED:
        raise UsageError(f"--t goes with --masks {' or '.join(LEVELLED)}, not with {law}")
    draw = _Draw(samples, scored, tuple(keys), sample, block_length, levels)
    hidden, weights = _LAWS[law](draw)
    weights = torch.where((hidden & scored).any(dim=1), weights, torch.zeros_like(weights))
    prompt_hidden = None
    if prompt_mask > 0:
        names = [stream_key(*keys, sample, k, "prompt") for k in range(samples)]
        numbers = uniform(key_tensor(names)[:, None], torch.arange(prompt_length)[None])
        prompt_hidden = numbers < prompt_mask
    return MaskSet(hidden, weights, scored, prompt_hidden)


def _independent(draw: _Draw) -> tuple[Tensor, Tensor]:
    numbers = draw.numbers(draw.samples, draw.length + 1)
    level, order = draw.between(numbers[:, 0]), numbers[:, 1:]
    return draw.spread(order < level[:, None]), 1 / level


def _uniform(draw: _Draw) -> tuple[Tensor, Tensor]:
    numbers = draw.numbers(draw.samples, draw.length + 1)
    counts = 1 + (numbers[:, 0] * draw.length).long()
    hidden = _first_of_ranking(numbers[:, 1:], counts)
    return draw.spread(hidden), draw.length / counts.double()


def _complementary(draw: _Draw) -> tuple[Tensor, Tensor]:
    numbers = draw.numbers(draw.samples // 2, draw.length + 1)
    return _pairs(draw, numbers[:, 0], numbers[:, 1:])


def _stratified(draw: _Draw) -> tuple[Tensor, Tensor]:
    pairs = draw.samples // 2
    numbers = draw.numbers(pairs, draw.length + 1)
    start = uniform(key_tensor([stream_key(*draw.keys, "levels")]), torch.zeros(1).long())
    turned = (start + draw.sample * GOLDEN_RATIO) % 1
    # A pair with level u has the levels u and 1 - u, so that the strata divide (0, 1/2).
    level = (torch.arange(pairs, dtype=torch.float64) + turned) / (2 * pairs)
    return _pairs(draw, level, numbers[:, 1:])


def _quadrature(draw: _Draw) -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.from_numpy(values) for values in leggauss(draw.samples))
    level, share = draw.between((nodes + 1) / 2), weights / 2
    order = draw.numbers(draw.samples, draw.length + 1)[:, 1:]
    return draw.spread(order < level[:, None]), draw.samples * share / level


def _block(draw: _Draw) -> tuple[Tensor, Tensor]:
    place = torch.arange(draw.scored.numel())
    end = int(place[draw.scored].max()) + 1 if draw.length else 1
    numbers = draw.numbers(draw.samples, 2 + draw.scored.numel())
    first = (numbers[:, 0] * -(-end // draw.block_length)).long() * draw.block_length
    inside = (place >= first[:, None]) & (place < first[:, None] + draw.block_length) & draw.scored
    counts = 1 + (numbers[:, 1] * inside.sum(dim=1)).long()
    order = numbers[:, 2:].masked_fill(~inside, 2.0)
    behind = place >= first[:, None] + draw.block_length
    hidden = _first_of_ranking(order, counts) & inside | behind | ~draw.scored
    return hidden, draw.length / (hidden & draw.scored).sum(dim=1).double()


def _full(draw: _Draw) -> tuple[Tensor, Tensor]:
    hidden = torch.ones(draw.samples, draw.scored.numel(), dtype=torch.bool)
    return hidden, torch.ones(draw.samples, dtype=torch.float64)


def _pairs(draw: _Draw, level: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    first = _first_of_ranking(order, (level * (draw.length + 1)).long())
    hidden = torch.stack([first, ~first], dim=1).flatten(0, 1)
    return draw.spread(hidden), (draw.length + 1) / hidden.sum(dim=1).double()


def _first_of_ranking(order: Tensor, counts: Tensor) -> Tensor:
    """bool [K, L]: the `counts` [K] tokens that come first when ranked by `order` [K, L]."""
    return order.argsort(dim=1).argsort(dim=1) < counts[:, None]


_LAWS: dict[str, Callable[[_Draw], tuple[Tensor, Tensor]]] = {
    "independent": _independent,
    "uniform": _uniform,
    "complementary": _complementary,
    "stratified": _stratified,
    "quadrature": _quadrature,
    "block": _block,
    "full": _full,
}
