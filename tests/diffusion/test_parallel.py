"""Parallel decoding, where confidence says how many tokens a step decides, against Fast-dLLM's."""

import itertools
import random

import pytest
import torch
from conftest import invoke, tiny_policy

from dlmctl.diffusion.proposals import select_to_unmask
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig, configured
from dlmctl.records.errors import UsageError
from dlmctl.settings.sampler import Sampler

PROMPTS = [[3, 4, 8], [5, 8]]
RULES = [{"threshold": t} for t in (0.15, 0.3, 0.9)] + [{"factor": f} for f in (0.5, 1.6, 1.9)]


def decided(confidence, threshold=None, factor=None):
    """Places that a step decides, of masked tokens with these confidences (arXiv 2505.22618)."""
    surest_first = sorted(range(len(confidence)), key=lambda place: -confidence[place])
    if threshold is not None:
        sure = {place for place in surest_first if confidence[place] >= threshold}
        return sure | set(surest_first[:1])
    number = 1
    for place in surest_first[1:]:
        if confidence[place] < 1 - factor / (number + 2):
            break
        number += 1
    # The authors' loop over the tokens ends at the last one whether it breaks there or not.
    if number == len(surest_first) - 1:
        number += 1
    return set(surest_first[:number])


@pytest.mark.parametrize("rule", [*RULES, {"threshold": 0.0}, {"threshold": 1.0}, {"factor": 0.0}])
def test_a_step_decides_what_fast_dllm_decides(rule):
    """Confidences are multiples of 1/64, so that some are the same, and some are the bound itself;
    in half of the rows they are large, as the rule by a factor asks."""
    draw = random.Random(0)
    rows, wanted = [], []
    for number in range(2000):
        low = 0 if number % 2 else 40
        row = [draw.randint(low, 64) / 64 for _ in range(8)]
        masked = sorted(draw.sample(range(8), draw.randint(1, 8)))
        rows.append([c if place in masked else -torch.inf for place, c in enumerate(row)])
        wanted.append({masked[n] for n in decided([row[place] for place in masked], **rule)})
    stays = select_to_unmask(
        torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows)), SamplerConfig(8, 8, **rule)
    )
    assert [set(row.nonzero()[:, 0].tolist()) for row in stays] == wanted


def test_the_factor_in_numbers():
    """(n + 1)(1 - c_n) <= 0.5: c_1 at least 0.75, c_2 5/6, c_3 0.875, c_4 0.9."""
    rows = {
        (0.90, 0.99, 0.70, 0.95, 0.80): [1, 1, 0, 1, 0],
        (0.80, 0.70, 0.60, 0.10, 0.00): [1, 0, 0, 0, 0],
        (0.30, 0.20, 0.10, 0.05, 0.00): [1, 0, 0, 0, 0],  # not sure of any: the surest
        (0.91, 0.99, 0.10, 0.95, 0.92): [1, 1, 1, 1, 1],  # 0.1 would be left over
    }
    confidence = torch.tensor(list(rows), dtype=torch.float64)
    made = select_to_unmask(confidence, torch.ones(4), SamplerConfig(5, 5, factor=0.5))
    assert made.int().tolist() == list(rows.values())


@torch.no_grad()
def generate(policy, prompt, gen_length, block_length, rule):
    """Greedy, without a cache: tokens, steps at which they are decided, and number of passes."""
    mask, passes = policy.mask_id, 0
    x = torch.tensor([[*prompt, *[mask] * gen_length]])
    order = [-1] * gen_length
    for start in range(0, gen_length, block_length):
        block = range(start, min(start + block_length, gen_length))
        for step in itertools.count(start):
            masked = [n for n in block if order[n] < 0]
            if not masked:
                break
            logits = policy.model(input_ids=x).logits[0]
            passes += 1
            if policy.shift:
                logits = torch.cat([logits[:1], logits[:-1]])
            logits = logits[len(prompt) :]
            p = logits.double().softmax(-1)
            logits[:, mask] = -torch.inf
            token = logits.argmax(-1)
            for place in decided([float(p[n, token[n]]) for n in masked], **rule):
                x[0, len(prompt) + masked[place]] = token[masked[place]]
                order[masked[place]] = step
    return x[0, len(prompt) :].tolist(), order, passes


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("family", "cache"),
    [(f, "none") for f in ("llada", "dream", "mlm")] + [("dream", "prefix"), ("a2d", "dual")],
)
def test_a_block_takes_as_many_steps_as_it_needs(family, cache, rule):
    """With one layer a cache is exact."""
    policy = tiny_policy(family, layers=3 if cache == "none" else 1)
    for length, block in ((12, 4), (16, 16), (11, 4)):
        made = sample(policy, PROMPTS, [0, 1], SamplerConfig(length, block, cache=cache, **rule))
        for prompt, ours in zip(PROMPTS, made, strict=True):
            assert ours[:3] == generate(policy, prompt, length, block, rule)


def test_a_threshold_of_one_decides_one_token_per_step_and_zero_all_at_once():
    policy = tiny_policy()
    one = sample(policy, PROMPTS[:1], [0], SamplerConfig(8, 4, threshold=1.0))[0]
    assert one.tokens == sample(policy, PROMPTS[:1], [0], SamplerConfig(8, 4, 8))[0].tokens
    all_at_once = sample(policy, PROMPTS[:1], [0], SamplerConfig(8, 4, threshold=0.0))[0]
    assert all_at_once.order == [0, 0, 0, 0, 4, 4, 4, 4]
    assert all_at_once.nfe == 2


@pytest.mark.parametrize("rule", [{"threshold": 1.0}, {"factor": 0.0}])
def test_the_steps_of_a_model_do_not_cut_a_block_short(rule):
    policy = tiny_policy()
    policy.sampling.update(gen_length=8, block_length=8, steps=2)
    assert configured(policy).steps == 2
    [done] = sample(policy, PROMPTS[:1], [0], configured(policy, Sampler(**rule)))
    # Of the factor's last step two are left.
    assert done.nfe == 8 - (rule == {"factor": 0.0})


def test_with_steps_a_threshold_keeps_at_least_the_quota():
    policy, threshold = tiny_policy(), 0.4
    settings = SamplerConfig(8, 8, 4, threshold=threshold)
    confidence = torch.tensor([[0.9, 0.5, 0.45, 0.1], [0.9, 0.3, 0.2, 0.1]]).double()
    stays = select_to_unmask(confidence, torch.tensor([2, 2]), settings)
    assert stays.tolist() == [[True, True, True, False], [True, True, False, False]]
    [done] = sample(policy, PROMPTS[:1], [0], settings)
    assert done.nfe <= 4


def test_steps_and_a_factor_are_not_both_taken():
    done = invoke("rollout", "--task", "sudoku", "--factor", "0.9", "--steps", "4")
    assert done.exit_code == 2
    assert "--steps is a fixed number of steps, and --factor takes as many as" in done.stderr
    assert "leave one of them out" in done.stderr


@pytest.mark.parametrize("remasking", ["random", "margin"])
def test_a_threshold_is_one_of_the_confidence_that_remasking_names(remasking):
    policy, nfe = tiny_policy(), []
    for threshold in (0.0, 0.3, 1.0):
        settings = SamplerConfig(8, 8, threshold=threshold, remasking=remasking)
        nfe.append(sum(x.nfe for x in sample(policy, PROMPTS * 20, range(40), settings)))
    assert nfe[0] == 40 < nfe[1] < nfe[2] == 320


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"threshold": 0.9, "factor": 1.0}, "--threshold and --factor are two rules"),
        ({"threshold": 0.9, "remasking": "entropy"}, "--threshold compares .* low_confidence or"),
        ({"factor": 1.0, "remasking": "entropy"}, "--factor compares .* take low_confidence or"),
        ({"threshold": 1.5}, "--threshold 1.5 is no confidence"),
        ({"threshold": float("nan")}, "--threshold nan is no confidence"),
        ({"factor": float("nan")}, "--factor nan is not 0 or more"),
    ],
)
def test_rules_of_confidence_that_make_no_sense_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        SamplerConfig(8, 4, **wrong)
