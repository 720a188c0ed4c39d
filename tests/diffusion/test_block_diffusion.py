"""Block diffusion: its masks, its two streams and its sampler against passes over one block alone.

The references below pass over the clean past and one noised block, with a mask written out as a
loop; nothing of `Blocks.attends` and nothing of a cache is in them.
"""

import dataclasses
import math
from itertools import combinations, product

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.elbo import Example, elbo_samples, token_log_probs
from dlmctl.diffusion.masks import draw_masks
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig, configured
from dlmctl.models.attention import Blocks
from dlmctl.records.errors import UsageError
from dlmctl.settings.mask_laws import UNBIASED
from dlmctl.settings.sampler import Sampler

KINDS = [("text", 0), ("text", 1), ("completion", 0), ("completion", 1)]
LENGTH = 3


def block_policy(origin="text", shift=0, length=LENGTH, seed=0):
    policy = tiny_policy("sdar", seed=seed)
    return dataclasses.replace(policy, blocks=Blocks(length, origin), shift=shift)


def block_number(policy, position, start):
    origin = start if policy.blocks.origin == "completion" else 0
    return (position - origin) // policy.blocks.length


@torch.no_grad()
def plain_logits(policy, ids, start):
    """[T, V]: logits of a text whose last block may be noised, each token's own."""
    numbers = [block_number(policy, place, start) for place in range(len(ids))]
    allowed = torch.tensor([[[[k <= q for k in numbers] for q in numbers]]])
    logits = policy.model(input_ids=torch.tensor([ids]), attention_mask=allowed).logits[0]
    return torch.stack([logits[max(0, place - policy.shift)] for place in range(len(ids))])


def plain_log_prob(policy, prompt, completion, hidden):
    """S(M), one pass for each block, over the clean blocks before it and itself."""
    clean, start, total = [*prompt, *completion], len(prompt), 0.0
    width = len(clean)
    if policy.blocks.origin == "text":  # the last block is sampled whole
        width += -width % policy.blocks.length
    numbers = [block_number(policy, place, start) for place in range(width)]
    for block in sorted({numbers[start + place] for place in hidden}):
        ids = [*clean, *[policy.mask_id] * (width - len(clean))]
        inside = [place for place in hidden if numbers[start + place] == block]
        for place in inside:
            ids[start + place] = policy.mask_id
        ids = [token for token, number in zip(ids, numbers, strict=True) if number <= block]
        rows = plain_logits(policy, ids, start).log_softmax(-1)
        total += sum(float(rows[start + place, completion[place]]) for place in inside)
    return total


def enumerated_elbo(policy, prompt, completion):
    """sum over l of 1/l times the mean of S over all subsets of size l."""
    total = 0.0
    for size in range(1, len(completion) + 1):
        subsets = list(combinations(range(len(completion)), size))
        values = [plain_log_prob(policy, prompt, completion, places) for places in subsets]
        total += sum(values) / len(subsets) / size
    return total


def test_a_token_attends_to_what_its_definition_says():
    places, noised = torch.tensor([[0, 1, 2, 3, 2, 4]]), torch.tensor([[0, 0, 0, 0, 1, 1]]).bool()
    mask = Blocks(2).attends(places, places, noised, noised, torch.tensor([1]))[0].tolist()
    clean = {0: [0, 1], 1: [0, 1], 2: [0, 1, 2, 3], 3: [0, 1, 2, 3]}
    copies = {4: [0, 1, 4], 5: [0, 1, 2, 3, 5]}
    for query, keys in {**clean, **copies}.items():
        assert [key for key, seen in enumerate(mask[query]) if seen] == keys


@pytest.mark.parametrize(("origin", "shift"), KINDS)
def test_two_streams_equal_a_pass_for_each_block(origin, shift):
    policy = block_policy(origin, shift)
    prompts = [[3, 4], [5], [6, 7, 8, 3], [4, 4, 5, 6, 7]]
    completions = [[4, 5, 6, 7], [7, 3, 5, 5, 8, 4, 6], [3, 8], [8, 7, 6, 5, 4, 3]]
    generator = torch.Generator().manual_seed(shift)
    hidden = [torch.rand(len(c), generator=generator) < 0.6 for c in completions]
    values = token_log_probs(policy, prompts, completions, hidden).sum(dim=1).tolist()
    for prompt, completion, mask, value in zip(prompts, completions, hidden, values, strict=True):
        places = mask.nonzero()[:, 0].tolist()
        expected = plain_log_prob(policy, prompt, completion, places)
        assert value == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(("origin", "shift"), KINDS)
@pytest.mark.parametrize("law", UNBIASED)
def test_every_estimator_of_the_elbo_is_unbiased(law, origin, shift):
    policy, prompt, completion = block_policy(origin, shift), [3, 4], [5, 3, 8, 4, 6]
    exact, length = enumerated_elbo(policy, prompt, completion), len(completion)
    draws = 1500 if law == "independent" else 500
    scored = torch.ones(length, dtype=torch.bool)
    examples = [
        Example(prompt, completion, draw_masks(law, 2, scored, (7, name), 1))
        for name in range(draws)
    ]
    estimates = elbo_samples(policy, examples, 512).mean(dim=1)
    stderr = float(estimates.std()) / math.sqrt(draws)
    assert abs(float(estimates.mean()) - exact) <= 3.5 * stderr + 1e-9


def test_with_blocks_of_one_token_the_elbo_is_the_likelihood():
    """Every token is then predicted from all that is before it: probabilities add up to 1."""
    policy = block_policy("completion", 0, length=1)
    completions = [list(tokens) for tokens in product(range(policy.vocab_size), repeat=2)]
    everything = torch.ones(2, dtype=torch.bool)
    masked = [everything] * len(completions)
    values = token_log_probs(policy, [[3, 4]] * len(completions), completions, masked).sum(dim=1)
    assert float(values.logsumexp(dim=0)) == pytest.approx(0, abs=1e-10)
    alone = enumerated_elbo(policy, [3, 4], completions[5])
    assert alone == pytest.approx(float(values[5]), abs=1e-10)


def test_the_elbo_is_below_the_likelihood():
    """Of the ELBOs of all completions, the probabilities they bound add up to less than 1."""
    policy = block_policy("completion", 0, length=2)
    completions = [list(tokens) for tokens in product(range(policy.vocab_size), repeat=2)]
    bounds = torch.tensor([enumerated_elbo(policy, [3], tokens) for tokens in completions])
    assert -1 < float(bounds.logsumexp(dim=0)) < 0


@torch.no_grad()
def plain_generate(policy, prompt, gen_length, steps_per_block, threshold=None):
    """Greedy sampling with a whole pass in each step; returns tokens, their order and the steps."""
    start, size, origin = len(prompt), policy.blocks.length, policy.blocks.origin
    first = start // size * size if origin == "text" else start
    width = start + gen_length
    if origin == "text":
        width += -width % size
    ids, order, passes = [*prompt, *[policy.mask_id] * (width - start)], {}, 0
    for block, begin in enumerate(range(first, width, size)):
        end = min(begin + size, width)
        whole = size if origin == "text" else end - begin
        quota = [whole // steps_per_block] * steps_per_block
        for extra in range(whole % steps_per_block):
            quota[extra] += 1
        step = 0
        while left := [p for p in range(begin, end) if ids[p] == policy.mask_id]:
            logits = plain_logits(policy, ids[:end], start)
            passes += 1
            sure = logits.softmax(-1)
            logits[:, policy.mask_id] = -torch.inf
            token = logits.argmax(-1)
            left.sort(key=lambda p: -float(sure[p, token[p]]))
            if threshold is None:
                kept = left[: quota[step]]
            else:
                kept = [p for p in left if float(sure[p, token[p]]) >= threshold] or left[:1]
            for place in kept:
                ids[place] = int(token[place])
                order[place - start] = block * steps_per_block + step
            step += 1
    tokens = ids[start : start + gen_length]
    return tokens, [order[place] for place in range(gen_length)], passes


@pytest.mark.parametrize("cache", ["none", "exact"])
@pytest.mark.parametrize(("origin", "shift"), KINDS)
@pytest.mark.parametrize(("gen_length", "per_block"), [(9, 3), (7, 2), (2, 1), (4, 3)])
def test_greedy_samples_are_those_of_whole_passes(origin, shift, cache, gen_length, per_block):
    policy = block_policy(origin, shift, seed=gen_length)
    prompts = [[3, 4], [5], [6, 7, 8], [4, 4, 5, 6, 7]]
    blocks = -(-gen_length // LENGTH)
    config = configured(
        policy, Sampler(gen_length=gen_length, steps=per_block * blocks, cache=cache)
    )
    samples = sample(policy, prompts, [1, 2, 3, 4], config)
    for prompt, ours in zip(prompts, samples, strict=True):
        tokens, order, passes = plain_generate(policy, prompt, gen_length, per_block)
        assert (ours.tokens, ours.order, ours.nfe) == (tokens, order, passes)


@pytest.mark.parametrize(("origin", "shift"), KINDS)
def test_rows_at_different_blocks_do_not_disturb_each_other(origin, shift):
    policy = block_policy(origin, shift, seed=5)
    prompts = [[3, 4], [5] * 11, [6, 7, 8], [4, 4, 5, 6, 7]]
    config = configured(policy, Sampler(gen_length=8, threshold=0.4))
    assert config.cache == "exact"
    samples = sample(policy, prompts, [1, 2, 3, 4], config)
    for prompt, ours in zip(prompts, samples, strict=True):
        tokens, order, passes = plain_generate(policy, prompt, 8, LENGTH, threshold=0.4)
        assert (ours.tokens, ours.order, ours.nfe) == (tokens, order, passes)
    assert len({ours.nfe for ours in samples}) > 1


def test_noise_is_the_same_with_and_without_a_cache():
    policy = block_policy("text", 0)
    for seed in range(5):
        with_cache, without = (
            sample(policy, [[3, 4]], [seed], SamplerConfig(8, LENGTH, temperature=1.0, cache=rule))
            for rule in ("exact", "none")
        )
        assert with_cache == without


def test_a_block_causal_model_keeps_its_own_blocks():
    policy = block_policy()
    assert configured(policy, Sampler(block_length=LENGTH)).block_length == LENGTH
    with pytest.raises(UsageError, match="attends in blocks of 3 tokens"):
        configured(policy, Sampler(block_length=8))
    with pytest.raises(UsageError, match="is an approximation"):
        configured(policy, Sampler(cache="dual"))
    with pytest.raises(UsageError, match="--cache exact is for block-causal models"):
        configured(tiny_policy(), Sampler(cache="exact"))
    guided = configured(policy, Sampler(cfg_scale=1.0))
    assert guided.cache == "none"
