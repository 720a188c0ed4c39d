"""The rivals of RSPO, each against a value worked out by hand."""

import math
from typing import get_args

import pytest
import torch
from conftest import tiny_policy
from torch import Tensor

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.objectives.scores import Scores
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.settings.algorithms import Reinforcement


def scores_of(current, old=None, reference=None, advantage=(1.0,), prompt=None, **more):
    """Scores of made-up log-probabilities [N, K, G]; all tokens are targets unless said."""
    now = torch.tensor(current, dtype=torch.float64, requires_grad=True)

    def table(values):
        return torch.tensor(values, dtype=torch.float64) if values else now.detach().clone()

    n, k, g = now.shape
    targets = torch.tensor(more.get("targets", [[[True] * g] * k] * n))
    return Scores(
        now,
        table(old),
        table(reference),
        targets,
        torch.tensor(more.get("weights", [[1.0] * k] * n), dtype=torch.float64),
        torch.tensor(more.get("lengths", [float(g)] * n), dtype=torch.float64),
        torch.tensor(advantage, dtype=torch.float64),
        torch.tensor(prompt or [0] * n),
    )


def loss_and_gradient(objective, scores):
    loss = objective.loss(scores)
    (gradient,) = torch.autograd.grad(loss, scores.current)
    return float(loss.detach()), gradient * scores.targets


def test_diffu_grpo():
    # Ratios 2 and 1/2 with A = 1: min(2, 1.5) = 1.5 clipped, min(0.5, 0.5) = 0.5.
    # Reference log 2 below the policy on the first token: k3 = 1/2 + log 2 - 1.
    scores = scores_of(
        [[[math.log(0.4), math.log(0.1)]]],
        old=[[[math.log(0.2), math.log(0.2)]]],
        reference=[[[math.log(0.2), math.log(0.1)]]],
    )
    objective = make_objective("diffu-grpo")
    loss, gradient = loss_and_gradient(objective, scores)
    assert loss == pytest.approx((-2.0 + 0.04 * (math.log(2) - 0.5)) / 2)
    # The clipped token is held by the penalty alone: 0.04 * (1 - 1/2) / 2; the other by -0.5 / 2.
    assert gradient[0, 0].tolist() == pytest.approx([0.01, -0.25])
    assert objective.metrics(scores) == {"clipped": 0.5}


def test_diffu_grpo_counts_target_tokens_over_the_whole_batch():
    scores = scores_of(
        [[[-1.0, -1.0]], [[-1.0, 0.0]]],
        advantage=(1.0, -1.0),
        targets=[[[True, True]], [[True, False]]],
    )
    loss, gradient = loss_and_gradient(make_objective("diffu-grpo", beta=0.0), scores)
    assert loss == pytest.approx(-1 / 3)
    assert gradient[:, 0].tolist() == [pytest.approx([-1 / 3, -1 / 3]), pytest.approx([1 / 3, 0])]


def test_wd1():
    # softmax((log 2, 0)) = (2/3, 1/3), softmax((-log 2, 0)) = (1/3, 2/3): weights 1/3, -1/3.
    scores = scores_of(
        [[[-1.0, -2.0]], [[-5.0, -1.0]], [[-7.0, -7.0]]],
        advantage=(math.log(2), 0.0, 0.4),
        prompt=[0, 0, 1],
    )
    loss, gradient = loss_and_gradient(make_objective("wd1"), scores)
    # Group 0: -(1/3)(-3) + (1/3)(-6) = -1; group 1 alone has weight 0; mean of two groups.
    assert loss == pytest.approx(-0.5)
    assert gradient[:, 0, 0].tolist() == pytest.approx([-1 / 6, 1 / 6, 0])


def test_espo():
    # s - s_old = (1/2)(2 * log 2 + 1 * 2 log 2) = 2 log 2 over two tokens: rho = 2, clipped at 1.2.
    # s - s_ref = (1/2)(2 * 0 + 1 * 1) = 0.5: beta * 0.25 / (2 * 2).
    current = [[[-1.0, 0.0], [0.0, -1.0]]]
    targets = [[[True, False], [False, True]]]
    scores = scores_of(
        current,
        old=[[[-1.0 - math.log(2), 0.0], [0.0, -1.0 - 2 * math.log(2)]]],
        reference=[[[-1.0, 0.0], [0.0, -2.0]]],
        targets=targets,
        weights=[[2.0, 1.0]],
    )
    objective = make_objective("espo", beta=0.01)
    loss, gradient = loss_and_gradient(objective, scores)
    assert loss == pytest.approx(-1.2 + 0.01 * 0.25 / 4)
    # Only the penalty pulls: beta * 0.5 / 2 on s, times weight / K.
    assert gradient[0, :, 0].tolist()[0] == pytest.approx(0.0025 * 2 / 2)
    assert objective.metrics(scores)["clipped"] == 1.0
    fresh = scores_of(current, targets=targets, weights=[[2.0, 1.0]])
    loss, gradient = loss_and_gradient(objective, fresh)
    assert loss == pytest.approx(-1.0)
    assert float(gradient[0, 0, 0]) == pytest.approx(-(1 / 2) * 2 / 2)


def test_gdsd():
    # One pair whose masks moved by 2e-4 and 4e-4 in all: D = 3e-4, inside the clamp.
    current, targets = [[[-1.0, 0.0], [0.0, -1.0]]], [[[True, False], [False, True]]]
    old = [[[-1.0002, 0.0], [0.0, -1.0004]]]
    reference = [[[-3.0, 0.0], [0.0, -1.0]]]
    scores = scores_of(current, old=old, reference=reference, advantage=(0.5,), targets=targets)
    loss, gradient = loss_and_gradient(make_objective("gdsd", psi=2.0), scores)
    # S - S_ref = (2 + 0) / 2 = 1.
    assert loss == pytest.approx((1.5e-4 - 1.0) ** 2 + 1e-3 * 1 / 4)
    assert float(gradient[0, 0, 0]) == pytest.approx(
        2 * (1.5e-4 - 1.0) * 0.5 / 2 + 1e-3 * 1 * 0.5 / 2
    )
    far = scores_of(current, old=[[[-2.0, 0.0], [0.0, -1.0]]], advantage=(0.5,), targets=targets)
    loss, gradient = loss_and_gradient(make_objective("gdsd", beta=0.0, psi=1.0), far)
    assert loss == pytest.approx((math.log(1 + 4e-4) / 2 - 0.5) ** 2)
    assert float(gradient.abs().max()) == 0


@pytest.mark.parametrize(
    "targets",
    [
        [[[True, True]]],
        [[[True, False], [True, False]]],
        [[[True, True], [False, True]]],
        [[[True, False], [False, False]]],
    ],
)
def test_gdsd_refuses_masks_that_are_no_pairs(targets):
    current = [[[-1.0, -1.0]] * len(targets[0])]
    with pytest.raises(UsageError, match=r"by a mask and its complement.*--masks complementary"):
        make_objective("gdsd").loss(scores_of(current, targets=targets))


def test_spg_lifts_the_lower_bound_of_what_is_good():
    # Masks hide both tokens, and the first: means (-1 - 3) / 2 = -2 and -2; elbo -2.
    scores = scores_of(
        [[[-1.0, -3.0], [-2.0, 0.0]]], targets=[[[True, True], [True, False]]], lengths=[2.0]
    )
    loss, gradient = loss_and_gradient(make_objective("spg"), scores)
    assert loss == pytest.approx(2.0)
    assert gradient[0].tolist() == [pytest.approx([-0.25, -0.25]), pytest.approx([-0.5, 0])]


def test_spg_pushes_the_upper_bound_of_what_is_bad_down():
    # t = 1 and 1/2. beta 1: token 1: log((0.5 + 0.25 / 0.5) / 2) = log 0.5;
    # token 2, hidden by the first mask alone: log((0.2 + 0) / 2) = log 0.1.
    current = [[[math.log(0.5), math.log(0.2)], [math.log(0.25), 0.0]]]
    targets = [[[True, True], [True, False]]]
    upper = (math.log(0.5) + math.log(0.1)) / 2
    lower = ((math.log(0.5) + math.log(0.2)) / 2 + math.log(0.25)) / 2
    scores = scores_of(current, advantage=(-1.0,), targets=targets)
    pure, gradient = loss_and_gradient(make_objective("spg", beta=1.0, omega=1.0), scores)
    assert pure == pytest.approx(upper)
    assert gradient[0].tolist() == [pytest.approx([0.25, 0.5]), pytest.approx([0.25, 0.0])]
    mixed, _ = loss_and_gradient(make_objective("spg", beta=1.0), scores)
    assert mixed == pytest.approx(0.5 * upper + 0.5 * lower)


def test_spg_weighs_completions_by_their_length():
    scores = scores_of(
        [[[-1.0, -1.0]], [[-4.0, 0.0]]],
        advantage=(0.5, 0.25),
        targets=[[[True, True]], [[True, False]]],
        lengths=[2.0, 1.0],
    )
    loss, _ = loss_and_gradient(make_objective("spg"), scores)
    assert loss == pytest.approx((0.5 * 1 * 2 + 0.25 * 4 * 1) / 3)


def test_vrpo():
    # Relative scores 1, 0, 0 in the first prompt; a winner over two losers; margins 1 and 1.
    scores = scores_of(
        [[[-1.0]], [[-3.0]], [[-2.0]], [[-2.0]]],
        reference=[[[-2.0]], [[-3.0]], [[-2.0]], [[-2.0]]],
        advantage=(1.0, -0.5, -0.5, 0.0),
        prompt=[0, 0, 0, 1],
    )
    objective = make_objective("vrpo", beta=0.5)
    loss, gradient = loss_and_gradient(objective, scores)
    assert loss == pytest.approx(math.log(1 + math.exp(-0.5)))
    slope = 0.5 / (1 + math.exp(0.5))
    assert gradient[:, 0, 0].tolist() == pytest.approx([-slope, slope / 2, slope / 2, 0])
    assert objective.metrics(scores) == {"pairs": 2, "ranked": 1.0}


def test_vrpo_without_a_preference_does_nothing():
    loss, gradient = loss_and_gradient(
        make_objective("vrpo"), scores_of([[[-1.0]], [[-2.0]]], advantage=(0.0, 0.0))
    )
    assert loss == 0
    assert float(gradient.abs().max()) == 0


FINITE = [*get_args(Reinforcement)]
for linear in ("rspo", "reinforce", "wd1"):
    FINITE.remove(linear)


@pytest.mark.parametrize("algo", FINITE)
def test_the_gradient_of_a_loss_agrees_with_finite_differences(algo):
    generator = torch.Generator().manual_seed(3)

    def draw(scale: float) -> Tensor:
        return torch.randn(4, 4, 3, generator=generator, dtype=torch.float64) * scale

    first = torch.rand(4, 2, 3, generator=generator) < 0.5
    targets = torch.stack([first, ~first], dim=2).flatten(1, 2)
    current = -draw(1.0).abs() * targets
    scores = Scores(
        current.clone().requires_grad_(),
        current + draw(1e-5) * targets,
        current + draw(0.3) * targets,
        targets,
        torch.rand(4, 4, generator=generator, dtype=torch.float64),
        torch.full((4,), 3.0, dtype=torch.float64),
        torch.tensor([0.5, -0.5, 0.2, -0.2], dtype=torch.float64),
        torch.tensor([0, 0, 1, 1]),
    )
    objective = make_objective(algo)
    (gradient,) = torch.autograd.grad(objective.loss(scores), scores.current)
    direction = draw(1.0) * targets
    values = []
    for size in (1e-6, -1e-6):
        with torch.no_grad():
            scores.current.copy_(current + size * direction)
        values.append(float(objective.loss(scores).detach()))
    slope = (values[0] - values[1]) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-9)


def groups(rewards):
    return [
        [
            Record(
                id=f"p{g}",
                sample=i,
                reward=reward,
                tokens={
                    "prompt": [3, 4 + g],
                    "completion": [3 + (g + i + j) % 5 for j in range(4)],
                },
                weights=[1.2, 0.8, 1.0, 1.0],
                rollout={"order": [0, 1, 2, 3]},
            )
            for i, reward in enumerate(group)
        ]
        for g, group in enumerate(rewards)
    ]


@pytest.mark.parametrize("algo", [a for a in get_args(Reinforcement) if a != "reinforce"])
def test_inner_steps_have_masks_of_their_own_and_an_old_policy_that_stays(algo):
    policy, reference = tiny_policy(seed=1), tiny_policy(seed=2)
    objective = make_objective(algo)
    recipe = objective.recipe
    plan = MaskPlan(recipe.law, recipe.samples, 0, recipe.until_eos, recipe.prompt_mask, 2)
    seen = []
    frozen = Reference("r", lambda e: log_probs(reference, e, 8))
    gradients = policy_gradients(
        policy, frozen, groups([[1, 0, 0], [0, 1, 1]]), objective, Batching(plan, inner=3), 4
    )
    for metrics in gradients:
        gradient = [p.grad.clone() for p in policy.model.parameters()]
        seen.append(torch.cat([g.flatten() for g in gradient]))
        assert math.isfinite(metrics["loss"])
        assert float(seen[-1].norm()) > 0
        with torch.no_grad():
            for p, g in zip(policy.model.parameters(), gradient, strict=True):
                p.sub_(1e-3 * g)
        policy.model.zero_grad()
    assert len(seen) == 3
    # The masks of an ordered law are the same in each step, and only the policy has moved.
    assert not torch.allclose(seen[0], seen[1], rtol=0.05 if recipe.samples else 1e-6)


def test_completions_with_advantage_zero_are_left_out_on_request():
    policy = tiny_policy(seed=1)
    frozen = Reference("r", lambda e: log_probs(tiny_policy(seed=2), e, 8))
    objective = make_objective("rspo", strength=0.1)

    def norm(rewards, drop):
        policy.model.zero_grad(set_to_none=True)
        batching = Batching(MaskPlan(), drop_zero_advantage=drop)
        [metrics] = policy_gradients(policy, frozen, groups(rewards), objective, batching, 8)
        found = [p.grad for p in policy.model.parameters() if p.grad is not None]
        return float(sum(g.norm() for g in found)), metrics

    assert norm([[1, 1]], drop=False)[0] > 0
    assert norm([[1, 1]], drop=True) == (0, {"loss": 0.0, "advantage_std": 0.0, "dropped": 2})
    assert norm([[1, 1], [1, 0]], drop=True)[1]["dropped"] == 2
