"""Masks that follow an order of decoding: their sum is the exact log-likelihood."""

import math
from itertools import product

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.elbo import Example, log_probs
from dlmctl.diffusion.masks import draw_masks, padded
from dlmctl.diffusion.sampler import sample_stream
from dlmctl.diffusion.sampling import Request, SamplerConfig
from dlmctl.diffusion.scoring import MaskPlan, completion_masks, example_of, mask_plan, score
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.mask_laws import ALL
from dlmctl.settings.masks import Masks


def scored(length):
    return torch.ones(length, dtype=torch.bool)


def drawn(order, samples=ALL, shrink=1, counted=None, law="trajectory"):
    tokens = scored(len(order)) if counted is None else torch.tensor(counted)
    return draw_masks(law, samples, tokens, (0, "a"), 0, order=order, shrink=shrink)


def picture(masks):
    """A line for each mask: # decided, _ masked, . visible."""
    return [
        "".join("#" if t else "_" if m else "." for t, m in zip(*rows, strict=True))
        for rows in zip(masks.targets.tolist(), masks.masked.tolist(), strict=True)
    ]


def test_a_mask_for_each_step_hides_what_was_not_decided_before_it():
    assert picture(drawn([0, 2, 1, 0, 4, 3, 4, 7])) == [
        "#__#____",
        "._#.____",
        ".#..____",
        "...._#__",
        "....#.#_",
        ".......#",
    ]


def test_merged_steps_are_those_of_the_code_of_tracerl():
    """The rows that its train/rl_llada.py makes of these step maps, with shrink 2."""
    assert picture(drawn([0, 2, 1, 0, 4, 3, 4, 7], shrink=2)) == [
        "#_##____",
        ".#.._#__",
        "....#.##",
    ]
    assert picture(drawn([5, 0, 1, 1, 2, 5, 3, 3], shrink=2)) == [
        "_###____",
        "_...#_##",
        "#....#..",
    ]


def test_tokens_that_do_not_count_are_hidden_like_others_and_never_targets():
    counted = [True, True, True, False, False]
    assert picture(drawn([1, 0, 3, 1, 2], counted=counted)) == ["_#___", "#.___", "..#.."]
    one_by_one = draw_masks("left-to-right", ALL, torch.tensor(counted), (0, "a"), 0)
    assert picture(one_by_one) == [
        "#____",
        ".#___",
        "..#__",
    ]


@pytest.mark.parametrize("family", ["sdar", "bd3lm"])
@pytest.mark.parametrize("law", ["trajectory", "left-to-right"])
def test_one_mask_has_a_step_of_every_block_of_a_block_causal_model(family, law):
    """Their sum is that of a mask for each step of the whole completion, in fewer passes."""
    policy, prompt = tiny_policy(family), [3, 4, 5]  # blocks of 4
    completion, order = [4, 5, 6, 7, 3, 3, 8], [1, 4, 6, 5, 4, 9, 8]
    follows = order if law == "trajectory" else None
    few = completion_masks(policy, 3, completion, MaskPlan(law, ALL), (0, "a"), 0, order=follows)
    many = draw_masks(law, ALL, scored(7), (0, "a"), 0, order=follows)
    longest = 4 if family == "bd3lm" or law == "left-to-right" else 3  # sdar: of [1], [4, 6, 5, 4]
    assert len(few.weights) == longest < len(many.weights)
    values = [
        float(log_probs(policy, [Example(prompt, completion, m)], 8).sum()) for m in (few, many)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-10)
    assert float(few.targets.sum(dim=0).max()) == 1


@pytest.mark.parametrize("law", ["trajectory", "left-to-right"])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_fewer_masks_are_some_of_all_and_their_mean_has_no_bias(law, samples):
    order, values = [3, 0, 0, 2, 1], torch.tensor([1.0, 10.0, 100.0, 1e3, 1e4]).double()
    whole, sums = set(picture(drawn(order, law=law))), []
    for name in range(800):
        masks = draw_masks(law, samples, scored(5), (0, name), 0, order=order)
        assert len(masks.weights) == samples
        assert set(picture(masks)) <= whole
        sums.append(float(((masks.targets * values).sum(dim=1) * masks.weights).mean()))
    error = torch.tensor(sums).std() / math.sqrt(len(sums))
    assert abs(sum(sums) / len(sums) - 11111) <= 4 * float(error)


def test_more_masks_than_there_are_steps_leave_the_sum_as_it_is():
    masks = drawn([0, 1, 0], samples=5)
    assert masks.weights.tolist() == [5, 5, 0, 0, 0]
    again = padded(masks, 10)
    assert again.weights.tolist() == [10, 10] + [0] * 8
    assert again.targets.shape == (10, 3)
    assert not again.targets[2:].any()


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "bd3lm"])
@pytest.mark.parametrize(("law", "order"), [("trajectory", [1, 0, 1, 2]), ("left-to-right", None)])
def test_the_likelihoods_of_all_completions_sum_to_one(family, law, order):
    policy = tiny_policy(family, alphabet="01")
    vocabulary = range(len(policy.model(torch.tensor([[3]])).logits[0, 0]))
    masks = draw_masks(law, ALL, scored(4), (0, "a"), 0, order=order)
    assert len(masks.weights) == (3 if order else 4)
    examples = [Example([3, 4], [*ids], masks) for ids in product(vocabulary, repeat=4)]
    values = log_probs(policy, examples, 512)
    assert bool((((values != 0).sum(dim=1)) <= 1).all())  # each token is a target once
    likelihood = values.sum(dim=(1, 2)).exp()
    assert float(likelihood.sum()) == pytest.approx(1, abs=1e-9)
    assert float(likelihood.max()) < 0.9


def test_the_states_are_those_that_the_sampler_went_through():
    policy, seen = tiny_policy(), []

    def look(module, inputs, given):
        seen.append(given["input_ids"][0].tolist())

    hook = policy.core.model.register_forward_pre_hook(look, with_kwargs=True)
    prompt = [3, 4]
    config = SamplerConfig(gen_length=7, block_length=4, steps=4, temperature=1.0)
    [made] = sample_stream(policy, [Request(prompt, 5)], config, 1)
    hook.remove()
    masks = drawn(made.order)
    states = [
        [*prompt, *(policy.mask_id if m else i for i, m in zip(made.tokens, row, strict=True))]
        for row in masks.masked.tolist()
    ]
    assert states == seen
    assert len(seen) == 4


def record(**rollout):
    return Record(
        id="a", tokens={"prompt": [3], "completion": [4, 5, 6]}, rollout=rollout, sample=0
    )


def test_an_exact_score_says_so_and_is_the_sum_over_the_steps():
    policy = tiny_policy()
    plan = mask_plan(Masks(law="trajectory"), 0)
    assert plan.samples == ALL
    ragged = [record(order=[2, 0, 1]), record(order=[0, 0, 0])]
    rows = list(score(ragged, {"policy": policy}, plan, 8))
    for row, steps in zip(rows, (3, 1), strict=True):
        entry = row["elbo"]["policy"]
        assert entry["stderr"] == 0
        assert len(entry["samples"]) == steps
        example = example_of(row, policy, plan)
        assert entry["value"] == pytest.approx(float(log_probs(policy, [example], 8).sum()))
        assert entry["masks"]["shrink"] == 1
    few = mask_plan(Masks(law="left-to-right", samples=2), 0)
    [row] = score([record()], {"policy": policy}, few, 8)
    assert row["elbo"]["policy"]["stderr"] > 0
    assert "shrink" not in row["elbo"]["policy"]["masks"]


@pytest.mark.parametrize(
    ("rollout", "fault"),
    [
        ({}, "is missing"),
        ({"order": [0, 1]}, "is something else"),
        ({"order": [0, 1, 2.5]}, "is something else"),
        ({"order": "012"}, "is something else"),
    ],
)
def test_a_record_without_its_order_is_refused(rollout, fault):
    bad = record(**rollout)
    bad.where = "f.jsonl:7"
    with pytest.raises(DataError, match=f"'rollout.order' {fault}, expected 3 numbers") as caught:
        example_of(bad, tiny_policy(), MaskPlan("trajectory", ALL))
    assert str(caught.value).startswith("f.jsonl:7:")


def test_a_law_that_draws_its_masks_is_told_how_many():
    with pytest.raises(UsageError, match="say how many with -k"):
        draw_masks("uniform", ALL, scored(3), (0, "a"), 0)
    with pytest.raises(UsageError, match="for records of 'dlmctl rollout'"):
        draw_masks("trajectory", ALL, scored(3), (0, "a"), 0)


def test_coupled_masks_come_in_threes():
    counted = torch.tensor([True] * 8 + [False] * 2)
    levels = []
    for name in range(200):
        masks = draw_masks("coupled", 6, counted, (0, name), 1)
        other = draw_masks("coupled", 6, counted, (0, name), 2)
        assert masks.masked[::3].all()
        assert torch.equal(masks.masked[1::3], ~masks.masked[2::3])
        assert not torch.equal(masks.masked, other.masked)
        threes = masks.weights.view(2, 3) / 1.5
        if masks.weights.all():  # 0 where no token that counts is masked
            assert threes[:, 0].tolist() == [1, 1]
            shares = 1 / threes[:, 1]
            assert torch.allclose(1 / threes[:, 2], 1 - shares)
            levels += shares.tolist()
            if other.weights.all():
                assert torch.equal(masks.weights, other.weights)
    assert min(levels) > 0.2
    assert max(levels) < 0.8
    assert sum(levels) / len(levels) == pytest.approx(0.5, abs=0.04)
    with pytest.raises(UsageError, match="coupled masks come in threes, not 4 samples"):
        draw_masks("coupled", 4, counted, (0, "a"), 0)
