"""The invariants that a faithful RSPO must satisfy."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.elbo import Example, elbo_samples, log_probs
from dlmctl.diffusion.masks import draw_masks
from dlmctl.diffusion.scoring import MaskPlan, example_of, score_entry
from dlmctl.records.jsonl import Record
from dlmctl.rl.gradient import accumulate_gradient, elbo_coefficients
from dlmctl.rl.objectives.rspo import residual_weights, rspo_loss
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients

PLAN = MaskPlan(samples=4)


def groups_of(rewards, prompt_ids=(3, 4, 8)):
    """Whole groups with made-up completions."""
    made = []
    for g, group in enumerate(rewards):
        made.append(
            [
                Record(
                    id=f"p{g}",
                    sample=i,
                    reward=reward,
                    tokens={
                        "prompt": [*prompt_ids, 3 + g],
                        "completion": [3 + (g + 2 * i + j) % 5 for j in range(4)],
                    },
                    rollout={"samples": len(group)},
                )
                for i, reward in enumerate(group)
            ]
        )
    return made


def gradient_of(policy):
    parameters = policy.model.parameters()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def scored_by(policy):
    return Reference(policy.revision, lambda examples: log_probs(policy, examples, 8))


def step(policy, reference, groups, algo="rspo", **settings):
    """Metrics and gradient of one batch."""
    policy.model.zero_grad()
    objective = make_objective(algo, **settings)
    [metrics] = policy_gradients(policy, scored_by(reference), groups, objective, Batching(PLAN), 3)
    return metrics, gradient_of(policy)


def scores_with_gradient(policy, groups, plan=PLAN):
    """s_i as a differentiable tensor, mask by mask through the model alone."""
    values = []
    for record in (r for group in groups for r in group):
        example = example_of(record, policy, plan)
        total = 0
        for hidden, weight in zip(example.masks.masked, example.masks.weights, strict=True):
            if not hidden.any():
                continue
            ids = torch.tensor([[*example.prompt, *example.completion]])
            targets = ids.clone()
            start = len(example.prompt)
            places = start + hidden.nonzero()[:, 0]
            ids[0, places] = policy.mask_id
            logits = policy.model(input_ids=ids).logits[0].log_softmax(-1)
            log_probs = logits[places].gather(1, targets[0, places][:, None])
            total = total + float(weight) * log_probs.sum()
        values.append(total / len(example.masks.weights))
    return torch.stack(values)


@pytest.fixture
def pair():
    """A policy and a reference that differ."""
    return tiny_policy(seed=1), tiny_policy(seed=2)


def test_at_the_reference_the_log_ratio_is_exactly_zero_and_the_step_is_reinforce():
    policy, groups = tiny_policy(), groups_of([[1, 0, 0, 1], [0, 0, 1, 0]])
    metrics, rspo = step(policy, policy, groups, strength=0.5)
    assert metrics["kl"] == 0.0
    assert metrics["feedback_ratio"] == 0.0
    _, reinforce = step(policy, policy, groups, algo="reinforce")
    assert torch.equal(rspo, reinforce)


@pytest.mark.parametrize(
    "objective",
    [
        make_objective("rspo", strength=0.5),
        make_objective("rspo", strength=0.5, residual_masks="independent"),
        make_objective("diffu-grpo", beta=0.1),
        make_objective("gdsd"),
    ],
)
def test_a_policy_that_is_the_reference_is_scored_for_both_until_it_moves(objective):
    """One pass rounds as itself, so that the ratio is 1 on every device; and it is paid once."""
    policy, groups = tiny_policy(), groups_of([[1, 0, 0, 1], [0, 0, 1, 0]])
    asked = []

    def other_rounding(examples):
        asked.append(examples)
        return log_probs(policy, examples, 8) * (1 + 1e-3)

    residual = getattr(objective, "residual_masks", "shared")
    batching = Batching(PLAN, inner=2, independent_residual=residual == "independent")
    frozen = Reference(policy.revision, other_rounding)
    steps = policy_gradients(policy, frozen, groups, objective, batching, 3)
    assert next(steps)["kl"] == 0.0
    assert asked == []
    with torch.no_grad():
        policy.model.get_output_embeddings().weight.mul_(1.1)
    assert next(steps)["kl"] != 0.0
    assert len(asked) == 1


def test_lambda_zero_is_reinforce_wherever_the_policy_is(pair):
    groups = groups_of([[1, 0, 0, 1]])
    _, zero = step(*pair, groups, strength=0.0)
    _, reinforce = step(*pair, groups, algo="reinforce")
    assert torch.equal(zero, reinforce)


def test_the_gradient_is_that_of_the_loss_as_it_is_written(pair):
    policy, reference = pair
    groups = groups_of([[1, 0, 0.5], [0, 0, 1]])
    _, ours = step(policy, reference, groups, strength=0.05)
    policy.model.zero_grad()
    with torch.no_grad():
        reference_scores = scores_with_gradient(reference, groups)
    rewards = torch.tensor([[1, 0, 0.5], [0, 0, 1]], dtype=torch.float64)
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
    scores = scores_with_gradient(policy, groups)
    rspo_loss(advantage, scores, reference_scores, 0.05).backward()
    assert torch.allclose(ours, gradient_of(policy), rtol=1e-9, atol=1e-12)


def test_the_gradient_is_lambda_times_that_of_half_the_squared_distance_to_the_target(pair):
    policy, reference = pair
    groups = groups_of([[1, 0, 0.5], [0, 0, 1]])
    strength = 0.2
    _, ours = step(policy, reference, groups, strength=strength)
    rewards = torch.tensor([[1, 0, 0.5], [0, 0, 1]], dtype=torch.float64)
    advantage = (rewards - rewards.mean(dim=1, keepdim=True)).flatten()
    policy.model.zero_grad()
    with torch.no_grad():
        reference_scores = scores_with_gradient(reference, groups)
    relative = scores_with_gradient(policy, groups) - reference_scores
    centred = relative - relative.mean()
    loss = strength * ((centred - advantage / strength) ** 2).mean() / 2
    loss.backward()
    assert torch.allclose(ours, gradient_of(policy), rtol=1e-9, atol=1e-12)


def test_the_gradient_agrees_with_finite_differences_in_float64(pair):
    policy, reference = pair
    groups = groups_of([[1, 0, 0.5], [0, 0, 1]])
    _, ours = step(policy, reference, groups, strength=0.2)
    records = [r for group in groups for r in group]
    examples = [example_of(r, policy, PLAN) for r in records]
    with torch.no_grad():
        frozen = elbo_samples(reference, examples, 8).mean(dim=1)
    advantage = torch.tensor([0.5, -0.5, 0.0, -1 / 3, -1 / 3, 2 / 3], dtype=torch.float64)

    def half_squares():
        scores = elbo_samples(policy, examples, 8).mean(dim=1)
        relative = scores - frozen
        centred = relative - relative.mean()
        return float(0.2 * ((centred - advantage / 0.2) ** 2).mean() / 2)

    parameters = list(policy.model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = float(ours @ torch.cat([d.flatten() for d in direction]))
        values = []
        for size in (1e-5, -2e-5):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(size * d)
            values.append(half_squares())
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(1e-5 * d)
        assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_weights_of_whole_groups_sum_to_zero():
    relative = torch.randn(6, dtype=torch.float64)
    advantage = torch.tensor([0.5, -0.5, 0.0, -1 / 3, -1 / 3, 2 / 3], dtype=torch.float64)
    for groups in (None, torch.tensor([0, 0, 0, 1, 1, 1])):
        weights = residual_weights(advantage, relative, 0.3, groups).weights
        assert abs(float(weights.sum())) < 1e-12


def test_a_constant_on_all_scores_or_on_a_groups_rewards_changes_nothing(pair):
    policy, reference = pair
    _, ours = step(policy, reference, groups_of([[1, 0, 0.5], [0, 0, 1]]), strength=0.2)
    _, shifted = step(policy, reference, groups_of([[4, 3, 3.5], [0, 0, 1]]), strength=0.2)
    assert torch.allclose(ours, shifted, rtol=1e-9, atol=1e-12)
    relative = torch.randn(6, dtype=torch.float64)
    advantage = torch.randn(6, dtype=torch.float64)
    first = residual_weights(advantage, relative, 0.3).weights
    second = residual_weights(advantage, relative + 7.0, 0.3).weights
    assert torch.allclose(first, second, atol=1e-12)


def test_equal_rewards_pull_back_to_the_reference_instead_of_doing_nothing(pair):
    policy, reference = pair
    groups = groups_of([[1, 1, 1, 1]])
    _, gradient = step(policy, reference, groups, strength=0.1)
    assert float(gradient.norm()) > 1e-4
    _, without = step(policy, reference, groups, strength=0.0)
    assert float(without.norm()) == 0.0

    def spread():
        examples = [example_of(r, policy, PLAN) for r in groups[0]]
        now = elbo_samples(policy, examples, 8).mean(dim=1)
        then = elbo_samples(reference, examples, 8).mean(dim=1)
        return float((now - then).var())

    before = spread()
    with torch.no_grad():
        for p, g in zip(
            policy.model.parameters(),
            gradient.split([p.numel() for p in policy.model.parameters()]),
            strict=True,
        ):
            p.sub_(1e-3 * g.view_as(p))
    assert spread() < before


def test_a_good_sample_becomes_more_likely_and_a_bad_one_less():
    policy = tiny_policy()
    groups = groups_of([[1, 0]])
    _, gradient = step(policy, policy, groups, strength=0.01)
    examples = [example_of(r, policy, PLAN) for r in groups[0]]
    before = elbo_samples(policy, examples, 8).mean(dim=1).tolist()
    with torch.no_grad():
        for p, g in zip(
            policy.model.parameters(),
            gradient.split([p.numel() for p in policy.model.parameters()]),
            strict=True,
        ):
            p.sub_(1e-2 * g.view_as(p))
    after = elbo_samples(policy, examples, 8).mean(dim=1).tolist()
    assert after[0] - before[0] > after[1] - before[1]


def test_lambda_per_token_is_length_times_lambda_per_sequence(pair):
    groups = groups_of([[1, 0, 0.5], [0, 0, 1]])
    length = 4
    _, sequence = step(*pair, groups, strength=0.01)
    _, token = step(*pair, groups, strength=0.01 * length, score_norm="token")
    assert torch.allclose(sequence / length, token, rtol=1e-9, atol=1e-12)


def test_centring_per_prompt_removes_what_a_prompt_has_in_common():
    advantage = torch.zeros(4, dtype=torch.float64)
    relative = torch.tensor([1.0, 3.0, 10.0, 14.0], dtype=torch.float64)
    batch = residual_weights(advantage, relative, 1.0)
    assert batch.centred.tolist() == [-6, -4, 3, 7]
    prompt = residual_weights(advantage, relative, 1.0, torch.tensor([0, 0, 1, 1]))
    assert prompt.centred.tolist() == [-1, 1, -2, 2]
    assert prompt.weights.tolist() == [1, -1, 2, -2]


def test_the_weight_shrinks_vanishes_and_flips_as_the_log_ratio_passes_its_target():
    advantage = torch.tensor([0.5, -0.5], dtype=torch.float64)
    for ratio, sign in ((0.0, 1), (25.0, 1), (50.0, 0), (80.0, -1)):
        relative = torch.tensor([ratio, -ratio], dtype=torch.float64)
        weight = float(residual_weights(advantage, relative, 0.01).weights[0])
        assert (weight > 1e-12) - (weight < -1e-12) == sign


def test_metrics_say_how_strong_the_feedback_is(pair):
    metrics, _ = step(*pair, groups_of([[1, 0, 0, 1]]), strength=10.0)
    assert metrics["feedback_ratio"] > 1
    assert 0 < metrics["flipped"] <= 1
    assert metrics["mask_variance"] > 0
    assert math.isfinite(metrics["kl"])


def test_scores_of_another_reference_are_made_again(pair):
    policy, reference = (replace(p, revision=name) for p, name in zip(pair, "ab", strict=True))
    groups = groups_of([[1, 0, 0.5]])
    sound, _ = step(policy, reference, groups)
    examples = [example_of(r, policy, PLAN) for r in groups[0]]
    for label, scorer in (("policy", policy), ("reference", policy)):
        for record, example, samples in zip(
            groups[0], examples, elbo_samples(scorer, examples, 8), strict=True
        ):
            entry = score_entry(scorer, PLAN, example, samples)
            record["elbo"] = {**record.get("elbo", {}), label: entry}
    taken, _ = step(policy, policy, groups)
    assert taken["kl"] == 0
    again, _ = step(policy, reference, groups)
    assert again["kl"] == sound["kl"] != 0


def test_the_gradient_does_not_depend_on_the_micro_batch(pair):
    policy, reference = pair
    groups = groups_of([[1, 0, 0.5], [0, 0, 1]])
    objective = make_objective("rspo", strength=0.2)
    gradients = []
    for size in (1, 2, 100):
        policy.model.zero_grad()
        list(
            policy_gradients(policy, scored_by(reference), groups, objective, Batching(PLAN), size)
        )
        gradients.append(gradient_of(policy))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
    assert torch.allclose(gradients[0], gradients[2], atol=1e-12)


def test_accumulating_mask_by_mask_gives_the_gradient_of_the_mean():
    policy = tiny_policy()
    masks = draw_masks("uniform", 5, torch.ones(4, dtype=torch.bool), (0, "a"), 0)
    example = Example([3, 4], [5, 6, 7, 3], masks)
    coefficients = elbo_coefficients([example], torch.tensor([2.0]).double())
    value = accumulate_gradient(policy, [example], coefficients, 1)
    ours = gradient_of(policy)
    policy.model.zero_grad()
    completion = torch.tensor([5, 6, 7, 3])
    ids = torch.cat([torch.tensor([[3, 4]] * 5), completion.where(~masks.masked, 2)], dim=1)
    rows = policy.model(input_ids=ids).logits[:, 2:].log_softmax(-1)
    rows = rows.gather(2, completion.expand(5, -1)[:, :, None])[:, :, 0] * masks.masked
    loss = 2.0 * (rows.sum(dim=1) * masks.weights).mean()
    loss.backward()
    assert value == pytest.approx(float(loss.detach()))
    assert torch.allclose(ours, gradient_of(policy), atol=1e-12)


def test_weights_from_masks_of_their_own_make_the_gradient_unbiased():
    """Over masks, E[d * grad s] = E[d] * E[grad s] + their covariance; only the first is meant."""
    policy, reference = tiny_policy("mlm", seed=1), tiny_policy("mlm", seed=2)
    groups = groups_of([[1, 1]])

    def mean_gradient(residual, draws):
        total = []
        for seed in range(draws):
            policy.model.zero_grad()
            batching = Batching(
                MaskPlan("uniform", 1, seed), independent_residual=residual == "independent"
            )
            objective = make_objective("rspo", strength=1.0, residual_masks=residual)
            list(policy_gradients(policy, scored_by(reference), groups, objective, batching, 8))
            total.append(gradient_of(policy))
        stacked = torch.stack(total)
        return stacked.mean(dim=0), stacked.std(dim=0) / draws**0.5

    # What is meant: weights from a score without noise.
    records = [r for group in groups for r in group]
    examples = [example_of(r, policy, MaskPlan("stratified", 1000)) for r in records]
    relative = elbo_samples(policy, examples, 500) - elbo_samples(reference, examples, 500)
    weights = residual_weights(torch.zeros(2).double(), relative.mean(dim=1), 1.0).weights
    policy.model.zero_grad()
    accumulate_gradient(policy, examples, elbo_coefficients(examples, -weights / 2), 500)
    meant = gradient_of(policy)

    independent, error = mean_gradient("independent", 400)
    shared, _ = mean_gradient("shared", 400)
    assert float(((independent - meant) / (error + 1e-12)).square().mean().sqrt()) < 1.5
    assert float((shared - meant).norm()) > 2 * float((independent - meant).norm())
