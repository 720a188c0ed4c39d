"""Mask laws of the ELBO: which completion tokens are masked, and with what weight.

For a completion of L scored tokens, S(M) = sum over i in M of log p(y_i | y outside M, x), and

    ELBO = sum_{l=1..L} (1/l) E[S(M) : M uniform among the subsets of size l]       (nats)

which is LLaDA's E_t[(1/t) S(M_t)] with every token masked with probability t ~ U(0, 1), since
integrating (1/t) t^l (1-t)^(L-l) C(L,l) over t gives 1/l. These laws have this expectation:

    independent    t ~ U(0,1), each token masked with probability t            weight 1/t
    uniform        l ~ U{1..L}, M uniform of size l                            weight L/l
    complementary  l ~ U{0..L}, M uniform of size l, then its complement       weight (L+1)/|M|;
                   for each pair the levels l of the n samples of a prompt are spread evenly:
                   sample i has k + round(i (L+1)/n) mod L+1, k ~ U{0..L}
    stratified     complementary pairs whose levels l are spread evenly over the masks of a
                   completion and, turned by the golden ratio, over the samples of its prompt

(LLaDA, arXiv 2502.09992, equations 3, 6 and 14; coupled pairs with the weight (L+1)/l and levels
spread over a batch as in the code of ESPO, arXiv 2512.03759.) These laws have a different
expectation, and serve the algorithms that were published with them:

    quadrature     t at the K nodes of Gauss-Legendre on (0,1), weight K w_k/t_k: low variance,
                   and the bias of quadrature with few nodes (GDPO, arXiv 2510.08554)
    block          l ~ U{1..b} of the b scored tokens of one block are masked, and all tokens of
                   the blocks after it; each token of the blocks before it is masked with the
                   probability that prompt tokens have. The weight is L/|M|, so that the score per
                   token is a mean over the masked tokens. The masks of a completion take its blocks
                   in random order, counted modulo the number of blocks with scored tokens (the code
                   of SPG, arXiv 2510.09541)
    full           everything is masked: the mean-field score of d1 (arXiv 2504.12216)

With a range [a, b] of levels, t is drawn from U(a, b), or the nodes lie in it; the weights are 1/t
as before. The expectation is then the part of the bound between two noise levels, divided by b - a.
Training on it has less variance (the clipped schedules of BD3-LM, arXiv 2503.09573).

Under `block` and `full` tokens that are not scored are masked too. Prompt tokens are masked on
request. Masks are a pure function of the names that identify a completion, so that two processes
score the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError
from dlmctl.settings.mask_laws import LAWS, LEVELLED, PAIRED

GOLDEN_RATIO = 0.6180339887498949


class MaskSet(NamedTuple):
    """K masks of one completion."""

    masked: Tensor
    """bool [K, G], true where a token is replaced by the mask token."""
    weights: Tensor
    """float64 [K]; weight of S(M_k), 0 where nothing is masked."""
    scored: Tensor
    """bool [G], the tokens that count."""
    prompt_masked: Tensor | None = None
    """bool [K, P], prompt tokens that are replaced too."""

    @property
    def targets(self) -> Tensor:
        """bool [K, G], the tokens whose log-probability is taken."""
        return self.masked & self.scored


class _Draw(NamedTuple):
    """What a law knows of a completion."""

    samples: int
    scored: Tensor
    keys: tuple[str | int, ...]
    sample: int
    group: int
    block_length: int
    before: float
    levels: tuple[float, float]

    @property
    def length(self) -> int:
        return int(self.scored.sum())

    def numbers(self, draws: int, width: int, *what: str) -> Tensor:
        """Uniform numbers [draws, width]; each draw has its own key."""
        keys = key_tensor([stream_key(*self.keys, self.sample, k, *what) for k in range(draws)])
        return uniform(keys[:, None], torch.arange(width)[None])

    def between(self, share: Tensor) -> Tensor:
        """Levels at these shares, in [0, 1], of the range."""
        least, greatest = self.levels
        return least + (greatest - least) * share

    def spread(self, masked: Tensor) -> Tensor:
        """Masks [K, L] over the scored tokens as masks [K, G] over all of them."""
        full = torch.zeros(len(masked), self.scored.numel(), dtype=torch.bool)
        full[:, self.scored] = masked
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
    group: int = 1,
) -> MaskSet:
    """Draw `samples` masks over one completion.

    Args:
        scored: bool [G], the tokens that count.
        keys: names of the draw that the samples of a prompt share: seed, record id.
        sample: which of the samples of the prompt it is.
        block_length: length of a block, for `block`.
        prompt_length: P, tokens of the prompt.
        prompt_mask: probability that a prompt token is masked and, under `block`, a token of the
            blocks before.
        levels: range of t, for the laws that draw one.
        group: n, how many neighbouring samples of the prompt share the levels of `complementary`.

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
    draw = _Draw(samples, scored, tuple(keys), sample, group, block_length, prompt_mask, levels)
    masked, weights = _LAWS[law](draw)
    weights = torch.where((masked & scored).any(dim=1), weights, torch.zeros_like(weights))
    prompt_masked = None
    if prompt_mask > 0:
        prompt_masked = draw.numbers(samples, prompt_length, "prompt") < prompt_mask
    return MaskSet(masked, weights, scored, prompt_masked)


def _independent(draw: _Draw) -> tuple[Tensor, Tensor]:
    numbers = draw.numbers(draw.samples, draw.length + 1)
    level, order = draw.between(numbers[:, 0]), numbers[:, 1:]
    return draw.spread(order < level[:, None]), 1 / level


def _uniform(draw: _Draw) -> tuple[Tensor, Tensor]:
    numbers = draw.numbers(draw.samples, draw.length + 1)
    counts = 1 + (numbers[:, 0] * draw.length).long()
    masked = _first_of_ranking(numbers[:, 1:], counts)
    return draw.spread(masked), draw.length / counts.double()


def _complementary(draw: _Draw) -> tuple[Tensor, Tensor]:
    pairs, levels = draw.samples // 2, draw.length + 1
    together, place = divmod(draw.sample, draw.group)
    names = [stream_key(*draw.keys, "levels", together, pair) for pair in range(pairs)]
    first = (uniform(key_tensor(names), torch.zeros(pairs).long()) * levels).long()
    offset = (2 * place * levels + draw.group) // (2 * draw.group)
    return _pairs(draw, (first + offset) % levels)


def _stratified(draw: _Draw) -> tuple[Tensor, Tensor]:
    pairs = draw.samples // 2
    start = uniform(key_tensor([stream_key(*draw.keys, "levels")]), torch.zeros(1).long())
    turned = (start + draw.sample * GOLDEN_RATIO) % 1
    # A pair with level u has the levels u and 1 - u, so that the strata divide (0, 1/2).
    level = (torch.arange(pairs, dtype=torch.float64) + turned) / (2 * pairs)
    return _pairs(draw, (level * (draw.length + 1)).long())


def _quadrature(draw: _Draw) -> tuple[Tensor, Tensor]:
    nodes, weights = (torch.from_numpy(values) for values in leggauss(draw.samples))
    level, share = draw.between((nodes + 1) / 2), weights / 2
    order = draw.numbers(draw.samples, draw.length + 1)[:, 1:]
    return draw.spread(order < level[:, None]), draw.samples * share / level


def _block(draw: _Draw) -> tuple[Tensor, Tensor]:
    place = torch.arange(draw.scored.numel())
    end = int(place[draw.scored].max()) + 1 if draw.length else 1
    first = (_blocks(draw) % -(-end // draw.block_length) * draw.block_length)[:, None]
    behind = place >= first + draw.block_length
    inside = (place >= first) & ~behind & draw.scored
    numbers = draw.numbers(draw.samples, 1 + place.numel())
    counts = 1 + (numbers[:, 0] * inside.sum(dim=1)).long()
    order = numbers[:, 1:].masked_fill(~inside, 2.0)
    masked = _first_of_ranking(order, counts) & inside | behind | ~draw.scored
    if draw.before > 0:
        masked |= (place < first) & (draw.numbers(*masked.shape, "before") < draw.before)
    return masked, draw.length / (masked & draw.scored).sum(dim=1).double()


def _blocks(draw: _Draw) -> Tensor:
    """int64 [K], blocks of the canvas: permutations of them, one after the other."""
    blocks = -(-draw.scored.numel() // draw.block_length)
    turns = range(-(-draw.samples // blocks))
    keys = key_tensor([stream_key(*draw.keys, draw.sample, "blocks", turn) for turn in turns])
    order = uniform(keys[:, None], torch.arange(blocks)[None]).argsort(dim=1)
    return order.flatten()[: draw.samples]


def _full(draw: _Draw) -> tuple[Tensor, Tensor]:
    masked = torch.ones(draw.samples, draw.scored.numel(), dtype=torch.bool)
    return masked, torch.ones(draw.samples, dtype=torch.float64)


def _pairs(draw: _Draw, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of `counts` [K/2] tokens, each followed by its complement."""
    order = draw.numbers(len(counts), draw.length + 1)[:, 1:]
    first = _first_of_ranking(order, counts)
    masked = torch.stack([first, ~first], dim=1).flatten(0, 1)
    return draw.spread(masked), (draw.length + 1) / masked.sum(dim=1).double()


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
