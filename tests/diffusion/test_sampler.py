"""The sampler against LLaDA's loop written out, and its own promises."""

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig, configured, tokens_per_step
from dlmctl.records.errors import DataError, UsageError
from dlmctl.settings.sampler import Sampler

PROMPT = [3, 4, 8]
OTHER = [5, 8]


@torch.no_grad()
def llada_generate(policy, prompt, gen_length, block_length, steps, cfg_scale=0.0, random=None):
    """LLaDA's published generation at temperature 0, for one prompt, as its paper describes it."""
    mask = policy.mask_id
    x = torch.tensor([[*prompt, *[mask] * gen_length]])
    order = [-1] * gen_length
    blocks = gen_length // block_length
    steps_per_block = steps // blocks
    step = 0
    for block in range(blocks):
        begin = len(prompt) + block * block_length
        end = begin + block_length
        count = int((x[0, begin:end] == mask).sum())
        plan = [count // steps_per_block] * steps_per_block
        for extra in range(count % steps_per_block):
            plan[extra] += 1
        for number in plan:
            logits = policy.model(input_ids=x).logits
            if cfg_scale > 0:
                blind = x.clone()
                blind[0, : len(prompt)] = mask
                unconditional = policy.model(input_ids=blind).logits
                logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
            if policy.shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
            probabilities = logits.double().softmax(-1)[0]
            logits = logits[0].clone()
            logits[:, mask] = -torch.inf
            token = logits.argmax(-1)
            confidence = probabilities.gather(1, token[:, None])[:, 0]
            confidence[x[0] != mask] = -torch.inf
            confidence[end:] = -torch.inf
            for place in confidence.topk(number).indices.tolist():
                x[0, place] = token[place]
                order[place - len(prompt)] = step
            step += 1
    return x[0, len(prompt) :].tolist(), order


@pytest.mark.parametrize("family", ["llada", "dream", "mlm"])
@pytest.mark.parametrize(("length", "block", "steps"), [(12, 12, 12), (12, 4, 6), (12, 4, 12)])
def test_greedy_samples_are_token_for_token_those_of_llada(family, length, block, steps):
    policy = tiny_policy(family)
    settings = SamplerConfig(gen_length=length, block_length=block, steps=steps)
    [first, second] = sample(policy, [PROMPT, OTHER], [1, 2], settings)
    for prompt, ours in ((PROMPT, first), (OTHER, second)):
        tokens, order = llada_generate(policy, prompt, length, block, steps)
        assert ours.tokens == tokens
        assert ours.order == order
        assert ours.nfe == steps


def test_greedy_samples_in_float32_are_those_of_llada():
    policy = tiny_policy(seed=3)
    policy.model.float()
    settings = SamplerConfig(gen_length=16, block_length=8, steps=8)
    [ours] = sample(policy, [PROMPT], [1], settings)
    assert ours.tokens == llada_generate(policy, PROMPT, 16, 8, 8)[0]


def test_guidance_is_that_of_llada():
    policy = tiny_policy()
    settings = SamplerConfig(gen_length=8, block_length=4, steps=8, cfg_scale=1.5)
    [ours] = sample(policy, [PROMPT], [1], settings)
    tokens, order = llada_generate(policy, PROMPT, 8, 4, 8, cfg_scale=1.5)
    assert (ours.tokens, ours.order, ours.nfe) == (tokens, order, 16)
    assert tokens != llada_generate(policy, PROMPT, 8, 4, 8)[0]


@pytest.mark.parametrize("remasking", ["low_confidence", "random", "entropy", "margin"])
def test_a_sample_does_not_depend_on_its_batch(remasking):
    policy = tiny_policy()
    settings = SamplerConfig(8, 4, 4, temperature=0.9, remasking=remasking)
    prompts = [PROMPT, OTHER, [6] * 7, PROMPT]
    together = sample(policy, prompts, [1, 2, 3, 4], settings)
    alone = [
        sample(policy, [p], [k], settings)[0] for p, k in zip(prompts, [1, 2, 3, 4], strict=True)
    ]
    assert together == alone
    assert together[0].tokens != together[3].tokens


def test_one_token_is_drawn_from_the_models_distribution():
    policy = tiny_policy()
    settings = SamplerConfig(gen_length=1, block_length=1, steps=1, temperature=1.0)
    draws = 4000
    samples = sample(policy, [PROMPT] * draws, list(range(draws)), settings)
    counts = torch.tensor([s.tokens[0] for s in samples]).bincount(minlength=policy.vocab_size)
    with torch.no_grad():
        logits = policy.model(input_ids=torch.tensor([[*PROMPT, policy.mask_id]])).logits[0, -1]
    logits[policy.mask_id] = -torch.inf
    expected = logits.softmax(0)
    error = (expected * (1 - expected) / draws).sqrt() + 1e-9
    assert bool(((counts / draws - expected).abs() < 4.5 * error).all())


def test_confidence_is_measured_without_temperature_and_guides_the_order():
    policy = tiny_policy()
    orders = {
        remasking: sample(policy, [PROMPT], [0], SamplerConfig(6, 6, 6, remasking=remasking))[
            0
        ].order
        for remasking in ("low_confidence", "random", "entropy", "margin")
    }
    assert all(sorted(order) == list(range(6)) for order in orders.values())
    with torch.no_grad():
        ids = torch.tensor([[*PROMPT, *[policy.mask_id] * 6]])
        p = policy.model(input_ids=ids).logits[0, 3:].double().softmax(-1)
    best = p.topk(2, dim=1).values
    entropy = -(p * p.log()).sum(dim=1)
    assert orders["margin"].index(0) == int((best[:, 0] - best[:, 1]).argmax())
    assert orders["entropy"].index(0) == int(entropy.argmin())


def test_end_of_sequence_can_be_left_out_or_put_last():
    policy = tiny_policy()
    settings = {"gen_length": 24, "block_length": 24, "steps": 24, "temperature": 2.0}
    keys = list(range(20))
    plain = sample(policy, [PROMPT] * 20, keys, SamplerConfig(**settings))
    assert any(policy.eos_id in s.tokens for s in plain)
    never = sample(policy, [PROMPT] * 20, keys, SamplerConfig(**settings, eos="never"))
    assert not any(policy.eos_id in s.tokens for s in never)
    late = sample(policy, [PROMPT] * 20, keys, SamplerConfig(**settings, eos="late"))
    for s in late:
        ends = [o for t, o in zip(s.tokens, s.order, strict=True) if t == policy.eos_id]
        others = [o for t, o in zip(s.tokens, s.order, strict=True) if t != policy.eos_id]
        assert not ends or not others or min(ends) > max(others)


def test_early_stop_fills_the_rest_with_end_of_sequence():
    policy = tiny_policy()
    settings = {"gen_length": 24, "block_length": 4, "steps": 24, "temperature": 2.0}
    full = sample(policy, [PROMPT] * 20, list(range(20)), SamplerConfig(**settings))
    short = sample(
        policy, [PROMPT] * 20, list(range(20)), SamplerConfig(**settings, early_stop=True)
    )
    stopped = 0
    for a, b in zip(full, short, strict=True):
        blocks = [a.tokens[i : i + 4] for i in range(0, 24, 4)]
        ends = [n for n, block in enumerate(blocks) if policy.eos_id in block]
        if ends:
            kept = 4 * (ends[0] + 1)
            assert b.tokens == a.tokens[:kept] + [policy.eos_id] * (24 - kept)
            assert b.nfe == kept
            stopped += 1
    assert stopped > 0


def test_the_mask_token_is_never_a_result():
    policy = tiny_policy()
    samples = sample(
        policy, [PROMPT] * 50, list(range(50)), SamplerConfig(6, 6, 3, temperature=5.0)
    )
    assert not any(policy.mask_id in s.tokens for s in samples)


def test_tokens_are_spread_evenly_over_the_steps():
    assert tokens_per_step(8, 3) == [3, 3, 2]
    assert tokens_per_step(2, 4) == [1, 1, 0, 0]
    assert tokens_per_step(32, 16) == [2] * 16


def test_a_last_block_may_be_shorter_and_more_steps_than_tokens_do_no_harm():
    policy = tiny_policy()
    short = sample(policy, [PROMPT], [0], SamplerConfig(gen_length=7, block_length=4, steps=8))[0]
    assert len(short.tokens) == 7
    assert policy.mask_id not in short.tokens
    assert max(short.order[:4]) < min(short.order[4:])


def test_settings_come_from_the_model_where_they_are_not_given():
    policy = tiny_policy()
    assert configured(policy, Sampler(gen_length=None, temperature=0.0)).gen_length == 6
    longer = configured(policy, Sampler(gen_length=64))
    assert (longer.gen_length, longer.block_length, longer.steps) == (64, 32, 64)


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"gen_length": 0}, {"block_length": 0}])
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(UsageError, match="--"):
        SamplerConfig(**{"gen_length": 8, "block_length": 4, "steps": 8, **wrong})


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "margin", "random"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_predicts_nan_is_refused(remasking, temperature):
    policy = tiny_policy()
    with torch.no_grad():
        next(policy.model.parameters())[PROMPT[0]] = torch.nan
    settings = SamplerConfig(4, 4, 4, remasking=remasking, temperature=temperature)
    with pytest.raises(DataError, match="predicts NaN"):
        sample(policy, [PROMPT], [1], settings)
