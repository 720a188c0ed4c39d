"""Log-probabilities of given tokens, a few rows of logits at a time."""

import pytest
import torch
from conftest import tiny_policy
from torch import nn

from dlmctl.diffusion import fused_linear_logprob
from dlmctl.diffusion.fused_linear_logprob import target_log_probs, weighted_log_prob

FAMILIES = ["llada", "dream", "a2d", "mlm", "ar"]


def problem(policy, number=7):
    generator = torch.Generator().manual_seed(3)
    width = policy.head.projection.in_features
    states = torch.randn(number, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(policy.vocab_size, (number,), generator=generator)
    coefficients = torch.randn(number, generator=generator, dtype=torch.float64)
    coefficients[2] = 0.0
    return states.requires_grad_(), targets, coefficients


def plain(policy, states, targets):
    return policy.logits(states).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def gradients(policy, states, value):
    policy.model.zero_grad()
    states.grad = None
    (3.0 * value).backward()
    own = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]
    return [states.grad.clone(), *own]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_values_and_gradients_are_those_of_the_whole_table(family, rows, monkeypatch):
    policy = tiny_policy(family)
    monkeypatch.setattr(fused_linear_logprob, "LOGITS_PER_CHUNK", rows * policy.vocab_size)
    states, targets, coefficients = problem(policy)
    values = plain(policy, states, targets)
    assert torch.allclose(target_log_probs(policy, states, targets), values, atol=1e-12)
    ours = weighted_log_prob(policy, states, targets, coefficients)
    theirs = (coefficients * values).sum()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-12)
    expected = gradients(policy, states, theirs)
    found = gradients(policy, states, weighted_log_prob(policy, states, targets, coefficients))
    assert len(found) == len(expected) > 1
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("cap", [None, 0.5])
def test_gradients_agree_with_finite_differences(cap):
    policy = tiny_policy("mlm")
    states, targets, coefficients = problem(policy, 3)
    matrix, bias = policy.head.projection.weight, policy.head.projection.bias
    assert torch.autograd.gradcheck(
        lambda *given: fused_linear_logprob._WeightedLogProb.apply(
            *given, targets, coefficients, cap
        ),
        (states, matrix, bias),
    )


def test_frozen_weights_get_no_gradient_and_the_states_keep_theirs():
    policy = tiny_policy()
    states, targets, coefficients = problem(policy)
    policy.model.requires_grad_(False)
    weighted_log_prob(policy, states, targets, coefficients).backward()
    assert states.grad.abs().sum() > 0
    assert policy.head.projection.weight.grad is None


def test_extreme_logits_stay_finite():
    policy = tiny_policy()
    states, targets, coefficients = problem(policy)
    far = (states.detach() * 1e4).requires_grad_()
    values = target_log_probs(policy, far, targets)
    assert torch.isfinite(values).all()
    assert values.min() < -1000
    weighted_log_prob(policy, far, targets, coefficients).backward()
    assert torch.isfinite(far.grad).all()


def test_under_autocast_products_are_in_half_precision_and_sums_are_not():
    policy = tiny_policy()
    policy.model.float()
    states, targets, coefficients = problem(policy)
    states = states.detach().float().requires_grad_()
    exact = weighted_log_prob(policy, states, targets, coefficients)
    expected = gradients(policy, states, exact)
    with torch.autocast("cpu", torch.bfloat16):
        half = weighted_log_prob(policy, states, targets, coefficients)
    assert half.dtype == torch.float32
    assert 0 < abs(float((half - exact).detach())) < 0.05
    for a, b in zip(gradients(policy, states, half), expected, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02


def test_no_states_score_nothing():
    policy = tiny_policy()
    width = policy.head.projection.in_features
    empty, none = torch.zeros(0, width, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    assert target_log_probs(policy, empty, none).shape == (0,)
    assert float(weighted_log_prob(policy, empty, none, none.double()).detach()) == 0.0


def test_the_head_of_every_family_ends_in_a_plain_projection():
    for family in FAMILIES:
        assert type(tiny_policy(family).head.projection) is nn.Linear
