"""The ELBO estimators against full enumeration, and the score function against plain sums."""

import math
from itertools import combinations

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.elbo import (
    Example,
    elbo_samples,
    log_probs,
    micro_batches,
    summarize,
    token_log_probs,
)
from dlmctl.diffusion.masks import MaskSet, draw_masks
from dlmctl.diffusion.scoring import MaskPlan, completion_masks
from dlmctl.settings.mask_laws import UNBIASED

PROMPT = [3, 4, 8]


def plain_log_prob(policy, prompt, completion, hidden):
    """S(M) by the model's own forward pass: one row, no padding."""
    ids = [*prompt, *completion]
    for place in hidden:
        ids[len(prompt) + place] = policy.mask_id
    logits = policy.model(input_ids=torch.tensor([ids])).logits[0]
    total = 0.0
    for place in hidden:
        row = logits[len(prompt) + place - policy.shift]
        total += float(row.log_softmax(-1)[completion[place]].detach())
    return total


@torch.no_grad()
def enumerated_elbo(policy, prompt, completion):
    """sum over l of 1/l times the mean of S over all subsets of size l."""
    length = len(completion)
    total = 0.0
    for size in range(1, length + 1):
        subsets = list(combinations(range(length), size))
        mean = sum(plain_log_prob(policy, prompt, completion, s) for s in subsets) / len(subsets)
        total += mean / size
    return total


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("law", UNBIASED)
def test_the_estimator_is_unbiased(law, length):
    policy = tiny_policy(seed=length)
    completion = [3 + (n * 5 + length) % 5 for n in range(length)]
    exact = enumerated_elbo(policy, PROMPT, completion)
    draws = 2000 if law == "independent" else 750
    scored = torch.ones(length, dtype=torch.bool)
    examples = [
        Example(PROMPT, completion, draw_masks(law, 2, scored, (7, name), 1))
        for name in range(draws)
    ]
    estimates = elbo_samples(policy, examples, 512).mean(dim=1)
    stderr = float(estimates.std()) / math.sqrt(draws)
    assert abs(float(estimates.mean()) - exact) <= 3 * stderr + 1e-9


def test_hidden_prompt_tokens_are_masked_and_not_scored(policy):
    completion = [4, 5, 6]
    hidden = torch.ones(1, 3, dtype=torch.bool)
    masks = MaskSet(hidden, torch.ones(1).double(), hidden[0], torch.tensor([[True, False, True]]))
    [[value]] = elbo_samples(policy, [Example(PROMPT, completion, masks)], 1).tolist()
    seen = [policy.mask_id, PROMPT[1], policy.mask_id]
    assert value == pytest.approx(plain_log_prob(policy, seen, completion, [0, 1, 2]))


def test_tokens_that_are_hidden_but_do_not_count_are_left_out(policy):
    completion = [4, 5, 6]
    masks = draw_masks("full", 1, torch.tensor([True, False, True]), (0, "a"), 0)
    table = log_probs(policy, [Example(PROMPT, completion, masks)], 1)
    everything = draw_masks("full", 1, torch.ones(3, dtype=torch.bool), (0, "a"), 0)
    whole = log_probs(policy, [Example(PROMPT, completion, everything)], 1)
    assert table[0, 0, 1] == 0
    assert torch.allclose(table[0, 0, ::2], whole[0, 0, ::2], atol=1e-12)


@pytest.mark.parametrize("family", ["llada", "dream", "a2d", "mlm"])
def test_scores_equal_the_models_own_forward_pass(family):
    policy = tiny_policy(family)
    completion = [4, 5, 6, 7]
    hidden = torch.tensor([True, False, True, True])
    [value] = token_log_probs(policy, [PROMPT], [completion], [hidden]).sum(dim=1)
    assert float(value) == pytest.approx(plain_log_prob(policy, PROMPT, completion, [0, 2, 3]))


def test_an_autoregressive_score_is_the_exact_log_likelihood():
    policy = tiny_policy("ar")
    completion = [4, 5, 6, 7, 1]
    logits = policy.model(input_ids=torch.tensor([[*PROMPT, *completion]])).logits[0]
    log_probs = logits.detach().log_softmax(-1)
    exact = sum(float(log_probs[len(PROMPT) + i - 1, t]) for i, t in enumerate(completion))
    masks = completion_masks(policy, 3, completion, MaskPlan(), (0, "a"), 0)
    [samples] = elbo_samples(policy, [Example(PROMPT, completion, masks)], 4)
    assert samples.tolist() == pytest.approx([exact])
    assert summarize(samples, paired=False, exact=True).stderr == 0


def test_scores_do_not_depend_on_the_batch():
    policy = tiny_policy()
    examples = [
        Example(
            [3] * (1 + n),
            [4, 5, 6, 7][: 1 + n % 4],
            draw_masks("uniform", 3, torch.ones(1 + n % 4, dtype=torch.bool), (0, n), 0),
        )
        for n in range(7)
    ]
    one = elbo_samples(policy, examples, 1)
    many = elbo_samples(policy, examples, 16)
    assert torch.allclose(one, many, rtol=0, atol=1e-10)


def test_less_than_half_of_a_batch_is_padding():
    scored = torch.ones(2, dtype=torch.bool)
    masks = MaskSet(scored[None], torch.ones(1, dtype=torch.float64), scored)
    lengths = [3, 40, 4, 9, 3, 5, 6, 2, 90, 4]
    examples = [Example([3] * length, [4, 5], masks) for length in lengths]
    wanted = torch.ones(len(lengths), 1).bool()
    wanted[2] = False
    parts = [
        [lengths[n] for n, _ in part] for part in micro_batches(examples, wanted, batch_size=4)
    ]
    assert parts == [[2, 3, 3, 4], [5, 6, 9], [40], [90]]


def test_a_mask_that_hides_nothing_scores_zero_without_a_forward_pass():
    policy = tiny_policy()
    masks = MaskSet(
        torch.zeros(2, 3, dtype=torch.bool),
        torch.zeros(2, dtype=torch.float64),
        torch.ones(3, dtype=torch.bool),
    )
    policy.model.forward = None
    assert elbo_samples(policy, [Example(PROMPT, [3, 4, 5], masks)], 4)[0].tolist() == [0, 0]


def test_the_standard_error_counts_a_complementary_pair_once():
    samples = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
    assert summarize(samples, paired=True).stderr == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert summarize(samples, paired=False).stderr == pytest.approx(float(samples.std()) / 2)
    assert summarize(samples[:2], paired=True).stderr is None
