"""ELBO of completions under a policy: sums of log-probabilities over masked tokens, in nats.

    s = (1/K) sum_k  weight_k * sum_{i in M_k} log p(y_i | y outside M_k, x)

`scored_states` is the only place where a model meets a mask: scoring and training call it. An
autoregressive policy goes through the same function with every token scored and none masked, which
is its exact log-likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from dlmctl.diffusion.fused_linear_logprob import target_log_probs
from dlmctl.diffusion.masks import MaskSet
from dlmctl.models.even_shapes import even_size
from dlmctl.models.policy import Policy
from dlmctl.models.sending import sent
from dlmctl.models.vision import Picture
from dlmctl.train.distributed import all_reduce_sum, rank, world_size
from dlmctl.train.sharding import whole_pass

T = TypeVar("T")


class Example(NamedTuple):
    """A completion to be scored."""

    prompt: Sequence[int]
    completion: Sequence[int]
    masks: MaskSet
    pictures: Sequence[Picture] = ()
    """Of the prompt, for a policy that takes images."""

    def visible_prompt(self, k: int, mask_id: int | None) -> Sequence[int]:
        """The prompt as mask k leaves it."""
        if self.masks.prompt_masked is None:
            return self.prompt
        masked = self.masks.prompt_masked[k].tolist()
        return [mask_id or 0 if m else i for i, m in zip(self.prompt, masked, strict=True)]


class Score(NamedTuple):
    """An ELBO estimate."""

    value: float
    """Mean over the masks, in nats."""
    stderr: float | None
    """Standard error of the mean over independent draws; None with a single one, 0 if exact."""
    samples: Tensor
    """float64 [K], one estimate for each mask."""


def scored_tokens(completion: Sequence[int], policy: Policy, until_eos: bool) -> Tensor:
    """bool [G]: every token, or those up to and including the first that ends a completion."""
    scored = torch.ones(len(completion), dtype=torch.bool)
    if until_eos:
        scored[policy.length(completion) :] = False
    return scored


class Scored(NamedTuple):
    """The N target tokens of a batch of rows, and the hidden states that predict them."""

    states: Tensor
    """[N, H]."""
    targets: Tensor
    """int64 [N], the tokens."""
    rows: Tensor
    """int64 [N]."""
    columns: Tensor
    """int64 [N], places in the completion."""


def scored_states(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    masked: Sequence[Tensor],
    targets: Sequence[Tensor] | None = None,
    pictures: Sequence[Sequence[Picture]] = (),
    mask_ids: Sequence[int] = (),
) -> Scored:
    """A pass over a batch of rows, up to the last hidden states; differentiable.

    Args:
        prompts, completions: B sequences of token ids.
        masked: B bool tensors [G_b], the tokens that the mask token replaces.
        targets: B bool tensors [G_b], the tokens that are scored; None: those masked.
        pictures: images of the B prompts.
        mask_ids: the mask token of each of the B rows, for a model that has several.

    Raises:
        UsageError: the model has several, and it is not said which.
    """
    if not mask_ids:
        policy.check_one_mask()
        mask_ids = [policy.mask_id or 0] * len(prompts)
    lengths = torch.tensor([len(p) + len(c) for p, c in zip(prompts, completions, strict=True)])
    starts = torch.tensor([len(prompt) for prompt in prompts])
    whole = policy.blocks.whole(lengths) if policy.blocks else lengths
    most = getattr(policy.core.config, "max_position_embeddings", None)
    width = even_size(int(whole.max()), policy.device, policy.core.dtype, most)
    ids = torch.full((len(lengths), width), policy.pad_id, dtype=torch.int64)
    is_masked = torch.zeros_like(ids, dtype=torch.bool)  # [B, L], like `ids`
    is_scored = torch.zeros_like(is_masked)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[b, :end] = torch.tensor([*prompt, *completion])
        is_masked[b, start:end] = masked[b]
        is_masked[b, end : int(whole[b])] = True  # the rest of the last block, as it is sampled
        is_scored[b, start:end] = (masked if targets is None else targets)[b]
    rows, positions = is_scored.nonzero(as_tuple=True)  # [N], [N]
    noised = ids
    if policy.diffusion:
        noised = torch.where(is_masked, torch.tensor(mask_ids)[:, None], ids)

    view, device = policy.noised_rows(ids, noised, is_scored, starts, whole), policy.device
    places = view.sources(rows, positions, policy.shift)
    named = torch.stack([places, ids[rows, positions], rows, positions - starts[rows]])
    places, target_ids, rows, columns = sent(named, device)  # [N] each
    states = policy.hidden_of(view.to(device), pictures)
    return Scored(states[rows, places], target_ids, rows, columns)


@torch.no_grad()
def token_log_probs(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    masked: Sequence[Tensor],
    targets: Sequence[Tensor] | None = None,
    pictures: Sequence[Sequence[Picture]] = (),
) -> Tensor:
    """Log-probability of every target token of a batch of rows, as `scored_states` takes them.

    Returns:
        float32 (or wider) [B, max G_b], in nats; 0 where nothing is scored.
    """

    def run() -> tuple[Scored, Tensor]:
        scored = scored_states(policy, prompts, completions, masked, targets, pictures)
        return scored, target_log_probs(policy, scored.states, scored.targets)

    scored, values = whole_pass(policy.model, run)
    table = values.new_zeros(len(prompts), max(len(c) for c in completions))
    return table.index_put((scored.rows, scored.columns), values)


def micro_batches(
    examples: Sequence[Example], wanted: Tensor, batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """(example, mask) pairs that are `wanted` [N, K]; sequences of like length share a batch.

    None is more than twice as long as another of its batch, so that less than half is padding.
    """
    part: list[tuple[int, int]] = []
    for pair in _by_length(examples, wanted):
        too_long = part and _length(examples, pair) > 2 * _length(examples, part[0])
        if too_long or len(part) == batch_size:
            yield part
            part = []
        part.append(pair)
    if part:
        yield part


def own_micro_batches(
    examples: Sequence[Example], wanted: Tensor, batch_size: int
) -> Iterator[tuple[list[tuple[int, int]], bool]]:
    """This rank's share of the micro-batches, and whether each counts: see `own_parts`."""
    if world_size() == 1:
        return ((part, True) for part in micro_batches(examples, wanted, batch_size))
    return own_parts(_by_length(examples, wanted), batch_size)


def own_parts(items: list[T], batch_size: int) -> Iterator[tuple[list[T], bool]]:
    """This rank's share of a list in micro-batches: in one process all of it.

    Every rank is given as many, since a pass of a model that is spread over them needs all; where
    there is too little, one item that does not count (False) and is another's.
    """
    if world_size() == 1:
        for start in range(0, len(items), batch_size):
            yield items[start : start + batch_size], True
        return
    parts = world_size() * math.ceil(len(items) / (world_size() * batch_size))
    for part in range(rank(), parts, world_size()):
        own = items[part * len(items) // parts : (part + 1) * len(items) // parts]
        yield own or items[:1], bool(own)


def _by_length(examples: Sequence[Example], wanted: Tensor) -> list[tuple[int, int]]:
    pairs = [(n, k) for k, n in wanted.T.nonzero().tolist()]
    pairs.sort(key=lambda pair: _length(examples, pair))
    return pairs


def _length(examples: Sequence[Example], pair: tuple[int, int]) -> int:
    example = examples[pair[0]]
    return len(example.prompt) + len(example.completion)


class MaskedRows(NamedTuple):
    """A micro-batch."""

    prompts: list[Sequence[int]]
    completions: list[Sequence[int]]
    masked: list[Tensor]
    targets: list[Tensor]
    pictures: list[Sequence[Picture]]


def masked_rows(
    policy: Policy, examples: Sequence[Example], pairs: Sequence[tuple[int, int]]
) -> MaskedRows:
    """What `scored_states` is given for these (example, mask) pairs."""
    return MaskedRows(
        [examples[n].visible_prompt(k, policy.mask_id) for n, k in pairs],
        [examples[n].completion for n, _ in pairs],
        [examples[n].masks.masked[k] for n, k in pairs],
        [examples[n].masks.targets[k] for n, k in pairs],
        [examples[n].pictures for n, _ in pairs],
    )


def mask_weights(examples: Sequence[Example]) -> Tensor:
    """float64 [N, K], the weight of each mask; every example has as many masks."""
    return torch.stack([example.masks.weights for example in examples])


@torch.no_grad()
def log_probs(policy: Policy, examples: Sequence[Example], batch_size: int) -> Tensor:
    """Log-probability of every target token: float64 [N, K, G] on the CPU, 0 elsewhere.

    Masks that mask nothing cost no forward pass. Under torchrun every rank scores its share and
    has the whole.
    """
    weights = mask_weights(examples)
    width = max(len(example.completion) for example in examples)
    table = torch.zeros(*weights.shape, width, dtype=torch.float64)
    for pairs, counts in own_micro_batches(examples, weights > 0, batch_size):
        values = token_log_probs(policy, *masked_rows(policy, examples, pairs)).double().cpu()
        n, k = torch.tensor(pairs).T
        if counts:
            table[n, k, : values.shape[1]] = values
    return all_reduce_sum(table)


def elbo_samples(policy: Policy, examples: Sequence[Example], batch_size: int) -> Tensor:
    """One ELBO estimate for each example and mask: float64 [N, K] in nats, on the CPU."""
    return log_probs(policy, examples, batch_size).sum(dim=2) * mask_weights(examples)


def summarize(samples: Tensor, paired: bool, exact: bool = False) -> Score:
    """Mean and standard error of estimates [K]; complementary pairs count as one draw."""
    if exact:
        return Score(float(samples.mean()), 0.0, samples)
    draws = samples.view(-1, 2).mean(dim=1) if paired else samples
    stderr = float(draws.std()) / math.sqrt(len(draws)) if len(draws) > 1 else None
    return Score(float(samples.mean()), stderr, samples)
