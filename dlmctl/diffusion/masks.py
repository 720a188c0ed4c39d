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
    coupled        in threes: everything; each token with probability t ~ U(0.2, 0.8), the same t
                   for all samples of a prompt; its complement. Their weights 1, 1/t and 1/(1-t)
                   are halved (the code of DiffuCoder, arXiv 2506.20639)

The ordered laws follow an order of decoding. Every scored token is a target once, under the mask of
the tokens that were still masked before the step that decided it. The sum of all log-probabilities
is the exact log-likelihood of the completion, given which positions each step decides:

    trajectory     the steps of the sampler, as `rollout` recorded them; `shrink` neighbouring steps
                   are one, which is exact for 1 alone (TraceRL, arXiv 2509.06949)
    left-to-right  one token after the other (JustGRPO, arXiv 2601.15165)

For a block-causal model steps are counted in each block, and a mask is of all blocks.

With `ALL` masks there is one for each of the n steps. With fewer, K of them are drawn without
replacement. Each has the weight n, so that the mean over the masks is the sum, or unbiased for it.

With a range [a, b] of levels, t is drawn from U(a, b), or the nodes lie in it; the weights are 1/t
as before. The expectation is then the part of the bound between two noise levels, divided by b - a.
Training on it has less variance (the clipped schedules of BD3-LM, arXiv 2503.09573).

Under `block`, `full`, `coupled` and the ordered laws, tokens that are not scored are masked too.
Prompt tokens are masked on request, the same ones in all masks of an ordered law. Masks are a pure
function of the names that identify a completion, so that two processes score the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import UsageError
from dlmctl.settings.mask_laws import ALL, LAWS, LEVELLED, ORDERED, TOGETHER

GOLDEN_RATIO = 0.6180339887498949
COUPLED_LEVELS = (0.2, 0.8)
"""Range of t under the law `coupled`."""


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
    decided: Tensor | None = None
    """bool [K, G], the scored tokens that a step of the decoding decides, for an ordered law."""

    @property
    def targets(self) -> Tensor:
        """bool [K, G], the tokens whose log-probability is taken."""
        return self.masked & self.scored if self.decided is None else self.decided


def padded(masks: MaskSet, samples: int) -> MaskSet:
    """The same with `samples` masks: those that are new mask nothing and have weight 0.

    The weights of the others grow, so that the mean over the masks stays what it is.
    """
    count = len(masks.weights)
    if count == samples:
        return masks

    def longer(table: Tensor | None) -> Tensor | None:
        if table is None:
            return None
        return torch.cat([table, table.new_zeros(samples - count, *table.shape[1:])])

    masked, weights = longer(masks.masked), longer(masks.weights * samples / count)
    assert masked is not None
    assert weights is not None
    return MaskSet(
        masked, weights, masks.scored, longer(masks.prompt_masked), longer(masks.decided)
    )


class _Drawn(NamedTuple):
    """What a law draws; the fields are those of `MaskSet`."""

    masked: Tensor
    weights: Tensor
    decided: Tensor | None = None


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
    order: Sequence[int] | None
    shrink: int

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
    order: Sequence[int] | None = None,
    shrink: int = 1,
) -> MaskSet:
    """Draw `samples` masks over one completion.

    Args:
        samples: K; `ALL` for an ordered law.
        scored: bool [G], the tokens that count.
        keys: names of the draw that the samples of a prompt share: seed, record id.
        sample: which of the samples of the prompt it is.
        block_length: length of a block, for `block`.
        prompt_length: P, tokens of the prompt.
        prompt_mask: probability that a prompt token is masked and, under `block`, a token of the
            blocks before.
        levels: range of t, for the laws that draw one.
        group: n, how many neighbouring samples of the prompt share the levels of `complementary`.
        order: G numbers, the step at which each token was decided, for the ordered laws; None for
            left-to-right is one step after the other.
        shrink: how many of these steps are one, for `trajectory`.

    Raises:
        UsageError: an unknown law, a range for one that draws no t, a number of samples that is
            none of whole pairs or threes, or `trajectory` without an order.
    """
    if law not in LAWS:
        raise UsageError(f"unknown mask law '{law}'; there are {', '.join(LAWS)}")
    if samples == ALL and law not in ORDERED:
        raise UsageError(f"--masks {law} draws as many masks as it is told: say how many with -k")
    if samples % TOGETHER.get(law, 1):
        wanted = "pairs; {} samples is odd" if TOGETHER[law] == 2 else "threes, not {} samples"
        raise UsageError(f"{law} masks come in {wanted.format(samples)}")
    if law == "trajectory" and order is None:
        raise UsageError(
            "--masks trajectory follows the steps that decided a completion, and is for records of "
            "'dlmctl rollout', which have them"
        )
    if levels != (0.0, 1.0) and law not in LEVELLED:
        raise UsageError(f"--t goes with --masks {' or '.join(LEVELLED)}, not with {law}")
    draw = _Draw(
        samples,
        scored,
        tuple(keys),
        sample,
        group,
        block_length,
        prompt_mask,
        levels,
        order,
        shrink,
    )
    masked, weights, decided = _LAWS[law](draw)
    weights = torch.where((masked & scored).any(dim=1), weights, torch.zeros_like(weights))
    prompt_masked = None
    if prompt_mask > 0:
        draws = 1 if law in ORDERED else len(masked)  # the steps of one decoding share a prompt
        numbers = draw.numbers(draws, prompt_length, "prompt").expand(len(masked), -1)
        prompt_masked = numbers < prompt_mask
    return padded(MaskSet(masked, weights, scored, prompt_masked, decided), samples or len(masked))


def _independent(draw: _Draw) -> _Drawn:
    numbers = draw.numbers(draw.samples, draw.length + 1)
    level, order = draw.between(numbers[:, 0]), numbers[:, 1:]
    return _Drawn(draw.spread(order < level[:, None]), 1 / level)


def _uniform(draw: _Draw) -> _Drawn:
    numbers = draw.numbers(draw.samples, draw.length + 1)
    counts = 1 + (numbers[:, 0] * draw.length).long()
    masked = _first_of_ranking(numbers[:, 1:], counts)
    return _Drawn(draw.spread(masked), draw.length / counts.double())


def _complementary(draw: _Draw) -> _Drawn:
    pairs, levels = draw.samples // 2, draw.length + 1
    together, place = divmod(draw.sample, draw.group)
    names = [stream_key(*draw.keys, "levels", together, pair) for pair in range(pairs)]
    first = (uniform(key_tensor(names), torch.zeros(pairs).long()) * levels).long()
    offset = (2 * place * levels + draw.group) // (2 * draw.group)
    return _pairs(draw, (first + offset) % levels)


def _stratified(draw: _Draw) -> _Drawn:
    pairs = draw.samples // 2
    start = uniform(key_tensor([stream_key(*draw.keys, "levels")]), torch.zeros(1).long())
    turned = (start + draw.sample * GOLDEN_RATIO) % 1
    # A pair with level u has the levels u and 1 - u, so that the strata divide (0, 1/2).
    level = (torch.arange(pairs, dtype=torch.float64) + turned) / (2 * pairs)
    return _pairs(draw, (level * (draw.length + 1)).long())


def _quadrature(draw: _Draw) -> _Drawn:
    nodes, weights = (torch.from_numpy(values) for values in leggauss(draw.samples))
    level, share = draw.between((nodes + 1) / 2), weights / 2
    order = draw.numbers(draw.samples, draw.length + 1)[:, 1:]
    return _Drawn(draw.spread(order < level[:, None]), draw.samples * share / level)


def _block(draw: _Draw) -> _Drawn:
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
    return _Drawn(masked, draw.length / (masked & draw.scored).sum(dim=1).double())


def _blocks(draw: _Draw) -> Tensor:
    """int64 [K], blocks of the canvas: permutations of them, one after the other."""
    blocks = -(-draw.scored.numel() // draw.block_length)
    turns = range(-(-draw.samples // blocks))
    keys = key_tensor([stream_key(*draw.keys, draw.sample, "blocks", turn) for turn in turns])
    order = uniform(keys[:, None], torch.arange(blocks)[None]).argsort(dim=1)
    return order.flatten()[: draw.samples]


def _full(draw: _Draw) -> _Drawn:
    masked = torch.ones(draw.samples, draw.scored.numel(), dtype=torch.bool)
    return _Drawn(masked, torch.ones(draw.samples, dtype=torch.float64))


def _coupled(draw: _Draw) -> _Drawn:
    threes, width = draw.samples // 3, draw.scored.numel()
    names = [stream_key(*draw.keys, "levels", three) for three in range(threes)]
    shares = uniform(key_tensor(names), torch.zeros(threes).long())
    least, greatest = COUPLED_LEVELS
    level = least + (greatest - least) * shares  # [K/3]
    first = draw.numbers(threes, width) < level[:, None]  # [K/3, G]
    masked = torch.stack([torch.ones_like(first), first, ~first], dim=1).flatten(0, 1)
    weights = torch.stack([torch.ones_like(level), 1 / level, 1 / (1 - level)], dim=1)
    # The mean over the masks of a three, times 3/2, is half their sum.
    return _Drawn(masked, weights.flatten() * 3 / 2)


def _trajectory(draw: _Draw) -> _Drawn:
    steps = torch.tensor(draw.order).unique(return_inverse=True)[1]  # 0, 1, … without gaps
    return _in_order(draw, steps // draw.shrink)


def _left_to_right(draw: _Draw) -> _Drawn:
    steps = range(draw.scored.numel()) if draw.order is None else draw.order
    return _in_order(draw, torch.tensor(steps))


def _in_order(draw: _Draw, step: Tensor) -> _Drawn:
    """A mask for each step [G] that decides a scored token; with fewer masks, for some of them."""
    steps = step[draw.scored].unique()  # [n]
    weight = float(len(steps))
    if draw.samples != ALL:
        ranking = draw.numbers(1, len(steps), "steps")[0].argsort()
        steps = steps[ranking[: draw.samples].sort().values]
    masked, decided = step >= steps[:, None], (step == steps[:, None]) & draw.scored
    return _Drawn(masked, torch.full((len(steps),), weight, dtype=torch.float64), decided)


def _pairs(draw: _Draw, counts: Tensor) -> _Drawn:
    """Masks of `counts` [K/2] tokens, each followed by its complement."""
    order = draw.numbers(len(counts), draw.length + 1)[:, 1:]
    first = _first_of_ranking(order, counts)
    masked = torch.stack([first, ~first], dim=1).flatten(0, 1)
    return _Drawn(draw.spread(masked), (draw.length + 1) / masked.sum(dim=1).double())


def _first_of_ranking(order: Tensor, counts: Tensor) -> Tensor:
    """bool [K, L]: the `counts` [K] tokens that come first when ranked by `order` [K, L]."""
    return order.argsort(dim=1).argsort(dim=1) < counts[:, None]


_LAWS: dict[str, Callable[[_Draw], _Drawn]] = {
    "independent": _independent,
    "uniform": _uniform,
    "complementary": _complementary,
    "stratified": _stratified,
    "quadrature": _quadrature,
    "block": _block,
    "full": _full,
    "coupled": _coupled,
    "trajectory": _trajectory,
    "left-to-right": _left_to_right,
}
