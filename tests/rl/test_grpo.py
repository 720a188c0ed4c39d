"""GRPO and SRPO: values of TRL's formulas, and what token weights must leave alone."""

from dataclasses import replace
from itertools import product
from math import exp, log

import pytest
import torch

from dlmctl.records.errors import UsageError
from dlmctl.rl.advantages import Normalization, advantages
from dlmctl.rl.objectives.scores import Scores
from dlmctl.rl.objectives.table import make_objective

# A group of four completions of 5, 3, 4 and 2 tokens; the rest of each row is padding.
OLD = [
    [-1, -0.5, -2, -0.2, -0.7],
    [-0.3, -1.2, -0.8, -0.1, -0.9],
    [-0.6, -0.4, -1.5, -2.2, -0.3],
    [-0.9, -0.2, -0.2, -0.2, -0.2],
]
MOVED = [
    [0.10, -0.05, 0.30, 0, -0.20],
    [0.25, -0.30, 0.05, -0.02, 0.15],
    [-0.10, 0.20, -0.35, 0.40, 0],
    [0.05, 0, -0.10, 0.22, -0.28],
]
REFERENCE = [
    [-0.05, 0.02, 0.10, 0, 0.05],
    [0.10, -0.10, 0, 0.03, -0.05],
    [0, 0.05, -0.20, 0.10, 0],
    [0.02, 0, 0.05, -0.05, 0.10],
]
LENGTHS = [5, 3, 4, 2]
WEIGHTS = [
    [1.2, 0.8, 1.2, 0.8, 1],
    [0.8, 0.8, 1.2, 1, 1],
    [0.8, 1.2, 0.8, 0.850016, 1],
    [1, 1, 1, 1, 1],
]
MEAN_ONE = [
    WEIGHTS[0],
    [0.857143, 0.857143, 1.285714, 1, 1],
    [0.876708, 1.315063, 0.876708, 0.931520, 1],
    WEIGHTS[3],
]
HALF = [[1 + 0.5 * (w - 1) for w in row] for row in WEIGHTS]


def gold_scores(weights=None):
    """The completions above, as an autoregressive policy scores them."""
    old = torch.tensor(OLD, dtype=torch.float64)[:, None]
    moved = torch.tensor(MOVED, dtype=torch.float64)[:, None]
    reference = torch.tensor(REFERENCE, dtype=torch.float64)[:, None]
    lengths = torch.tensor(LENGTHS)
    targets = (torch.arange(5) < lengths[:, None])[:, None]
    [advantage] = advantages([[1, 0, 1, 0]], Normalization.of("grpo"))
    more = {}
    if weights is not None:
        more["token_weights"] = torch.tensor(weights, dtype=torch.float64)
    return Scores(
        ((old + moved) * targets).requires_grad_(),
        old * targets,
        (old + reference) * targets,
        targets,
        torch.ones(4, 1, dtype=torch.float64),
        lengths.double(),
        torch.tensor(advantage, dtype=torch.float64),
        torch.zeros(4, dtype=torch.int64),
        **more,
    )


def gold_loss(algo, loss_type, weights=None, **settings):
    if loss_type == "dr_grpo":
        settings["max_length"] = 8
    objective = make_objective(algo, loss_type=loss_type, **settings)
    return float(objective.loss(gold_scores(weights)).detach())


def test_advantages_are_those_of_trl():
    [made] = advantages([[1, 0, 0, 1, 1, 0, 0, 0]], Normalization.of("grpo"))
    expected = {1: 1.207381, 0: -0.724429}
    assert made == pytest.approx([expected[r] for r in [1, 0, 0, 1, 1, 0, 0, 0]], abs=1e-6)


@pytest.mark.parametrize(
    ("clip_high", "beta", "grpo", "dapo", "dr_grpo"),
    [
        (None, 0.0, 0.011544, -0.241090, -0.105477),
        (None, 0.01, 0.011648, -0.240970, -0.105424),
        (0.28, 0.0, 0.002592, -0.252309, -0.110385),
        (0.28, 0.01, 0.002697, -0.252189, -0.110333),
    ],
)
def test_losses_are_those_of_the_formulas_of_trl(clip_high, beta, grpo, dapo, dr_grpo):
    expected = {"grpo": grpo, "dapo": dapo, "bnpo": dapo, "dr_grpo": dr_grpo}
    for loss_type, value in expected.items():
        found = gold_loss("grpo", loss_type, clip_high=clip_high, beta=beta)
        assert found == pytest.approx(value, abs=1e-6)
    assert gold_loss("grpo", "cispo") == pytest.approx(0.405638, abs=1e-6)


def test_metrics_of_the_same_case():
    found = make_objective("grpo", beta=0.01).metrics(gold_scores())
    ratios = [exp(d) for row, n in zip(MOVED, LENGTHS, strict=True) for d in row[:n]]
    assert found == pytest.approx(
        {"clip_low": 1 / 14, "clip_high": 3 / 14, "ratio": sum(ratios) / 14, "k3": 0.012021},
        abs=1e-6,
    )
    assert "k3" not in make_objective("grpo").metrics(gold_scores())
    higher = make_objective("grpo", clip_high=0.28).metrics(gold_scores())
    assert higher["clip_high"] == pytest.approx(2 / 14)


@pytest.mark.parametrize(
    ("weights", "grpo", "dapo", "dr_grpo"),
    [
        (WEIGHTS, 0.007747, -0.242046, -0.105895),
        (MEAN_ONE, 0.003396, -0.251332, -0.109958),
        (HALF, 0.009646, -0.241568, -0.105686),
    ],
)
def test_losses_of_srpo(weights, grpo, dapo, dr_grpo):
    for loss_type, value in {"grpo": grpo, "dapo": dapo, "dr_grpo": dr_grpo}.items():
        assert gold_loss("srpo", loss_type, weights) == pytest.approx(value, abs=2e-6)
        assert gold_loss("grpo", loss_type, weights) == gold_loss("grpo", loss_type)


def one_token(ratio, advantage, weight=1.0, **settings):
    """Loss of a single token, and its derivative by log p."""
    scores = Scores(
        torch.tensor([[[log(ratio)]]], dtype=torch.float64, requires_grad=True),
        *(torch.zeros(1, 1, 1, dtype=torch.float64) for _ in range(2)),
        torch.ones(1, 1, 1, dtype=torch.bool),
        *(torch.ones(*shape, dtype=torch.float64) for shape in ((1, 1), (1,))),
        torch.tensor([advantage], dtype=torch.float64),
        torch.zeros(1, dtype=torch.int64),
        token_weights=torch.tensor([[weight]], dtype=torch.float64),
    )
    loss = make_objective("srpo", **settings).loss(scores)
    (gradient,) = torch.autograd.grad(loss, scores.current)
    return float(loss.detach()), float(gradient)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # Pushed down from far above: 2 * 4 without a dual clip, 2 * 3 and no gradient with it.
        (4.0, -2.0, 6.0, 0.0),
        (2.0, -2.0, 4.0, 4.0),
        # Below 1 - eps: held by the plain clip, 2 * 0.8.
        (0.5, -2.0, 1.6, 0.0),
        # What is good is not bounded by it: clipped at 1 + eps, and free below.
        (4.0, 2.0, -2.4, 0.0),
        (0.5, 2.0, -1.0, -1.0),
    ],
)
def test_a_dual_clip_bounds_the_push_on_what_is_bad(ratio, advantage, loss, gradient):
    assert one_token(ratio, advantage, dual_clip=3.0) == pytest.approx((loss, gradient))
    weighted = one_token(ratio, advantage, weight=1.5, dual_clip=3.0)
    assert weighted == pytest.approx((1.5 * loss, 1.5 * gradient))
    if ratio == 4.0 and advantage < 0:
        assert one_token(ratio, advantage) == pytest.approx((8.0, 8.0))


def test_cispo_bounds_the_ratio_and_keeps_the_gradient():
    # d/dlog p of -min(rho, c) A log p, the ratio held constant.
    assert one_token(4.0, 2.0, loss_type="cispo", clip_high=3.0)[1] == pytest.approx(-3.0 * 2.0)
    assert one_token(4.0, 2.0, loss_type="cispo")[1] == pytest.approx(-4.0 * 2.0)
    assert one_token(0.1, -2.0, loss_type="cispo")[1] == pytest.approx(0.1 * 2.0)


def random_scores(seed, weights=None):
    """Three completions under four masks of unequal weight, ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = torch.rand(3, 4, 5, generator=generator) < 0.6
    current = -draw(3, 4, 5).abs() * targets
    if weights is None:
        weights = 0.5 + torch.rand(3, 5, generator=generator, dtype=torch.float64)
    return Scores(
        current.requires_grad_(),
        current.detach() + 0.3 * draw(3, 4, 5) * targets,
        current.detach() + 0.3 * draw(3, 4, 5) * targets,
        targets,
        torch.rand(3, 4, generator=generator, dtype=torch.float64),
        torch.tensor([5.0, 4.0, 3.0], dtype=torch.float64),
        torch.tensor([0.9, -0.7, -0.2], dtype=torch.float64),
        torch.zeros(3, dtype=torch.int64),
        token_weights=weights,
    )


def gradient_by_scores(objective, scores):
    (gradient,) = torch.autograd.grad(objective.loss(scores), scores.current)
    return gradient


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"dual_clip": 1.2, "clip_high": 0.3}])
def test_the_gradient_agrees_with_finite_differences(loss_type, settings):
    scores = random_scores(5)
    objective = make_objective("srpo", loss_type=loss_type, **settings)
    gradient = gradient_by_scores(objective, scores)
    direction = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1)) * scores.targets
    values = []
    for size in (1e-6, -1e-6):
        moved = replace(scores, current=(scores.current + size * direction).detach())
        values.append(float(objective.loss(moved)))
    slope = (values[0] - values[1]) / 2e-6
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)


def test_weighting_the_advantage_is_weighting_the_clipped_surrogate():
    """Written token by token, with the weight outside of the clip."""
    scores = random_scores(3)
    scores.current.requires_grad_(False)
    total = 0.0
    for n, k, t in product(range(3), range(4), range(5)):
        if scores.targets[n, k, t]:
            ratio = exp(float(scores.current[n, k, t] - scores.old[n, k, t]))
            advantage = float(scores.advantage[n])
            surrogate = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            if advantage < 0:
                surrogate = max(surrogate, 1.3 * advantage)
            away = float(scores.reference[n, k, t] - scores.current[n, k, t])
            penalty = 0.1 * (exp(away) - away - 1)
            weight = float(scores.token_weights[n, t])
            total += float(scores.weights[n, k]) / 4 * (penalty - weight * surrogate)
    objective = make_objective("srpo", dual_clip=1.3, beta=0.1)
    assert float(objective.loss(scores)) == pytest.approx(total / 12)


def test_token_weights_change_neither_what_is_clipped_nor_a_direction():
    scores = random_scores(3)
    weighted, plain = make_objective("srpo"), make_objective("grpo")
    found, expected = weighted.metrics(scores), plain.metrics(scores)
    assert {name: found[name] for name in expected} == expected
    assert 0 < expected["clip_low"] < 1 > expected["clip_high"] > 0
    by_weighted, by_plain = gradient_by_scores(weighted, scores), gradient_by_scores(plain, scores)
    assert torch.equal(by_weighted.sign(), by_plain.sign())
    assert torch.allclose(by_weighted, by_plain * scores.token_weights[:, None], rtol=1e-12)


def test_weights_of_one_are_grpo_to_the_bit():
    scores = random_scores(4, weights=torch.ones(3, 5, dtype=torch.float64))
    for settings in ({}, {"beta": 0.1, "dual_clip": 2.0}, {"loss_type": "cispo"}):
        weighted, plain = make_objective("srpo", **settings), make_objective("grpo", **settings)
        assert torch.equal(weighted.loss(scores), plain.loss(scores))
        assert torch.equal(gradient_by_scores(weighted, scores), gradient_by_scores(plain, scores))
    assert weighted.metrics(scores)["adv_abs_ratio"] == 1.0


def test_metrics_of_weights_by_hand():
    found = make_objective("srpo").metrics(gold_scores(WEIGHTS))
    scored = [row[:n] for row, n in zip(WEIGHTS, LENGTHS, strict=True)]
    mean = sum(map(sum, scored)) / 14
    # All advantages of the case are of one size.
    assert found["weight"] == pytest.approx(mean)
    assert found["adv_abs_ratio"] == pytest.approx(mean)
    nothing = replace(gold_scores(WEIGHTS), advantage=torch.zeros(4, dtype=torch.float64))
    assert make_objective("srpo").metrics(nothing)["adv_abs_ratio"] is None


def test_dr_grpo_divides_by_the_longest_completion_unless_told():
    assert gold_loss("grpo", "dr_grpo") == pytest.approx(-0.105477, abs=1e-6)
    objective = make_objective("grpo", loss_type="dr_grpo")
    assert float(objective.loss(gold_scores()).detach()) == pytest.approx(
        -0.105477 * 8 / 5, abs=1e-6
    )


def test_what_means_nothing_is_refused():
    with pytest.raises(UsageError, match="--max-length means nothing to --loss-type dapo"):
        make_objective("grpo", max_length=8)
    with pytest.raises(UsageError, match="--dual-clip means nothing to --loss-type cispo"):
        make_objective("srpo", loss_type="cispo", dual_clip=3.0)
    with pytest.raises(UsageError, match="--clip-high means nothing to --algo diffu-grpo"):
        make_objective("diffu-grpo", clip_high=0.3)
