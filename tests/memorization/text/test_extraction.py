"""Extraction: probabilities against enumeration of orders and of sequences, and by hand."""

from __future__ import annotations

import math
from functools import partial
from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.sampling import tokens_per_step
from dlmctl.memorization.text.extraction import (
    PartialText,
    asked_tokens,
    chance_in,
    greedy,
    mean_probability,
    random_order_log_probs,
    samples_needed,
)
from dlmctl.models.attention import noised_rows
from dlmctl.records.errors import UsageError

PROMPT = [4, 5]


def step_log_probs(policy, tokens, hidden):
    """Log-probabilities [G, V] under the sampler, which never writes the mask token."""
    ids = torch.tensor([[*PROMPT, *tokens]])
    ids[0, len(PROMPT) :][hidden] = policy.mask_id
    with torch.no_grad():
        logits = policy.model(input_ids=ids).logits[0]
    logits[:, policy.mask_id] = -torch.inf
    first = len(PROMPT) - policy.shift
    return logits[first : first + len(tokens)].log_softmax(-1)


def along(policy, tokens, asked, order, steps):
    """log p of the tokens asked for in an order, one pass after the other."""
    hidden, total, at = asked.clone(), 0.0, 0
    for count in tokens_per_step(len(order), steps):
        log_p = step_log_probs(policy, tokens, hidden)
        for place in order[at : at + count]:
            total += float(log_p[place, tokens[place]])
            hidden[place] = False
        at += count
    return total


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_mean_over_orders_is_that_of_all_orders(family, steps):
    policy = tiny_policy(family)
    text = PartialText(PROMPT, [3, 6, 4, 5], torch.tensor([True, False, True, True]))
    orders = list(permutations([0, 2, 3]))
    every = [along(policy, text.tokens, text.asked, order, steps) for order in orders]
    found = random_order_log_probs(policy, [text], steps, 60, [("k",)], 16)[0]
    # Each order that was drawn is one of them, and with so many all of them are.
    kinds = {round(value, 8) for value in every}
    assert {round(value, 8) for value in found.tolist()} == kinds
    exact = math.log(sum(map(math.exp, every)) / len(every))
    value, error = mean_probability(found)
    assert abs(math.exp(value - exact) - 1) < 4 * error + 1e-9


def test_probabilities_of_all_texts_sum_to_one():
    """Along an order the sampler is a distribution over what is asked for."""
    policy = tiny_policy()
    alphabet = [t for t in range(policy.vocab_size) if t != policy.mask_id]
    asked = torch.tensor([True, True])
    texts = [PartialText(PROMPT, list(pair), asked) for pair in product(alphabet, repeat=2)]
    keys = [("same",)] * len(texts)
    for steps in (1, 2):
        values = random_order_log_probs(policy, texts, steps, 1, keys, 32)
        assert float(values.exp().sum()) == pytest.approx(1)


def test_batches_and_company_change_nothing():
    policy = tiny_policy()
    texts = [
        PartialText(PROMPT, [3, 4, 5], torch.tensor([False, True, True])),
        PartialText([4], [6, 3, 5, 4, 4], torch.tensor([True, True, False, True, True])),
        PartialText(PROMPT, [5, 5], torch.tensor([True, False])),
    ]
    keys = [(n,) for n in range(3)]
    together = random_order_log_probs(policy, texts, 2, 3, keys, 64)
    for n, text in enumerate(texts):
        alone = random_order_log_probs(policy, [text], 2, 3, [keys[n]], 1)[0]
        assert alone.tolist() == pytest.approx(together[n].tolist())
        one = greedy(policy, [text], 2, 1)[0]
        other = greedy(policy, texts, 2, 8)[n]
        assert one.tokens == other.tokens
        assert one.log_prob == pytest.approx(other.log_prob)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_greedy_decides_the_most_confident_first(steps):
    policy = tiny_policy(seed=3)
    asked = torch.tensor([True, True, False, True, True])
    tokens = [3, 4, 6, 5, 4]
    [found] = greedy(policy, [PartialText(PROMPT, tokens, asked)], steps, 4)
    for forced in (False, True):
        written, hidden, total = list(tokens), asked.clone(), 0.0
        for count in tokens_per_step(4, steps):
            log_p = step_log_probs(policy, written, hidden)
            best = log_p.max(-1)
            ranked = sorted(hidden.nonzero()[:, 0].tolist(), key=lambda i: -float(best.values[i]))
            for place in ranked[:count]:
                total += float(log_p[place, tokens[place]])
                hidden[place] = False
                if not forced:
                    written[place] = int(best.indices[place])
        if forced:
            assert found.log_prob == pytest.approx(total)
        else:
            assert found.tokens == written


def test_an_autoregressive_model_has_the_chain_rule():
    policy = tiny_policy("ar")
    tokens = [3, 4, 5]
    asked = torch.tensor([False, True, True])
    [found] = greedy(policy, [PartialText(PROMPT, tokens, asked)], 1, 4)
    with torch.no_grad():
        log_p = policy.model(input_ids=torch.tensor([[*PROMPT, *tokens]])).logits[0].log_softmax(-1)
    expected = sum(float(log_p[len(PROMPT) + i - 1, tokens[i]]) for i in (1, 2))
    assert found.log_prob == pytest.approx(expected)
    with pytest.raises(UsageError, match="one order"):
        random_order_log_probs(policy, [PartialText(PROMPT, tokens, asked)], 1, 1, [(0,)], 1)


def test_a_block_causal_model_is_refused():
    policy, text = tiny_policy("sdar"), PartialText(PROMPT, [3, 4], torch.tensor([True, False]))
    with pytest.raises(UsageError, match="is block-causal: it sees nothing that is given behind"):
        greedy(policy, [text], 1, 1)
    with pytest.raises(UsageError, match="is block-causal"):
        random_order_log_probs(policy, [text], 1, 1, [(0,)], 1)


def oracle():
    """Knows two texts by heart, 0000 and 1111, one as likely as the other; 2 is the mask."""

    def hidden_of(rows, pictures=()):
        ids = rows.ids
        seen = torch.stack([(ids == 0).any(1), (ids == 1).any(1)], 1).double()
        nothing = ~seen.bool().any(1)
        seen[nothing] = 1
        logits = torch.cat([seen.log(), torch.full((len(ids), 1), -torch.inf)], 1)
        return logits[:, None].expand(-1, ids.shape[1], -1)

    core = SimpleNamespace(config=SimpleNamespace(), dtype=torch.float64)
    return SimpleNamespace(
        diffusion=True, name="oracle", core=core, pad_id=0, mask_id=2,
        vocab_size=3, hidden_of=hidden_of, device=torch.device("cpu"), shift=0, blocks=None,
        noised_rows=partial(noised_rows, None, 0), logits=lambda states: states.clone(),
        check_one_mask=lambda: None,
    )  # fmt: skip


def test_more_steps_extract_more_of_what_is_known_by_heart():
    text = PartialText([], [1, 1, 1, 1], torch.ones(4, dtype=torch.bool))
    found = [
        math.exp(mean_probability(random_order_log_probs(oracle(), [text], k, 5, [(0,)], 8)[0])[0])
        for k in (1, 2, 4)
    ]
    assert found == pytest.approx([1 / 16, 1 / 4, 1 / 2])


@pytest.mark.parametrize(
    ("mode", "given", "asked"),
    [
        ("prefix", 0.5, [0, 0, 0, 1, 1, 1]),
        ("suffix", 0.5, [1, 1, 1, 0, 0, 0]),
        ("edge", 0.5, [0, 0, 1, 1, 1, 0]),
        ("prefix", 0.0, [0, 1, 1, 1, 1, 1]),
        ("edge", 1.0, [0, 0, 0, 1, 0, 0]),
    ],
)
def test_what_is_asked_for(mode, given, asked):
    assert asked_tokens(6, mode, given, ()).int().tolist() == asked


def test_random_masks_have_the_size_and_are_of_their_keys():
    made = [asked_tokens(10, "random", 0.3, (n,)) for n in range(50)]
    assert {int(mask.sum()) for mask in made} == {7}
    assert len({tuple(mask.tolist()) for mask in made}) > 30
    assert torch.equal(made[3], asked_tokens(10, "random", 0.3, (3,)))


def test_how_many_samples_it_takes():
    assert chance_in(math.log(0.01), 100) == pytest.approx(1 - 0.99**100)
    assert chance_in(math.log(0.01), 100) == pytest.approx(0.634, abs=5e-4)
    for log_prob in (math.log(0.3), -20.0, -40.0):
        assert chance_in(log_prob, samples_needed(log_prob, 0.5)) == pytest.approx(0.5)
    assert samples_needed(-1e4, 0.5) == math.inf
    assert samples_needed(0.0, 0.9) == 1
