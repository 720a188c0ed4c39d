"""GRPO and SRPO: values of TRL's formulas, and what token weights must leave alone."""

from dataclasses import replace
from itertools import combinations, product
from math import comb, exp, log

import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.diffusion.elbo import Example, log_probs
from dlmctl.diffusion.masks import MaskSet
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import Sampling
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantages import advantages
from dlmctl.rl.algorithms import make_objective
from dlmctl.rl.gradient import accumulate_gradient
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.rl.scores import Scores

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
    [advantage] = advantages([[1, 0, 1, 0]], scale="group")
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
    [made] = advantages([[1, 0, 0, 1, 1, 0, 0, 0]], scale=make_objective("grpo").recipe.scale)
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


# With a model.

PLAN = MaskPlan(until_eos=True)


def gradient_of(policy):
    parameters = policy.model.parameters()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def step(policy, groups, algo="grpo", reference=None, **settings):
    """Metrics and gradient of one batch."""
    policy.model.zero_grad()
    objective = make_objective(algo, **settings)
    frozen = Reference("r", lambda examples: log_probs(reference or policy, examples, 8))
    batching = Batching(PLAN, scale=objective.recipe.scale)
    [metrics] = policy_gradients(policy, frozen, groups, objective, batching, 3)
    return metrics, gradient_of(policy)


def completed(policy, rewards=(1, 0, 0, 1), weights=False):
    """A group whose second completion goes on behind its end-of-sequence."""
    eos = policy.eos_id
    completions = [[3, 4, eos], [5, eos, 6, 4], [3, 7], [6, 5, 4, 7, eos]]
    group = []
    for sample, (ids, reward) in enumerate(zip(completions, rewards, strict=True)):
        record = Record(id="p", sample=sample, reward=reward)
        record["tokens"] = {"prompt": [4, 8], "completion": ids}
        if weights:
            record["weights"] = [0.5 + 0.25 * t for t in range(len(ids))]
        group.append(record)
    return group


def plain_loss(policy, group, loss_type, weighted):
    """GRPO at ratio 1 as it is written, from whole logits."""
    [advantage] = advantages([[r["reward"] for r in group]], scale="group")
    losses, lengths = [], []
    for record, value in zip(group, advantage, strict=True):
        prompt, completion = record["tokens"]["prompt"], record["tokens"]["completion"]
        if policy.eos_id in completion:
            completion = completion[: completion.index(policy.eos_id) + 1]
        logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        at = torch.arange(len(completion)) + len(prompt) - 1
        log_p = logits.log_softmax(-1)[at, torch.tensor(completion)]
        ratio = (log_p - log_p.detach()).exp()
        w = torch.tensor(record["weights"][: len(completion)]) if weighted else torch.ones(1)
        surrogate = torch.minimum(ratio * value * w, ratio.clamp(0.8, 1.2) * value * w)
        losses.append(-surrogate.sum())
        lengths.append(len(completion))
    if loss_type == "grpo":
        return sum(loss / n for loss, n in zip(losses, lengths, strict=True)) / len(group)
    if loss_type == "dr_grpo":
        return sum(losses) / (len(group) * max(lengths))
    return sum(losses) / sum(lengths)


@pytest.mark.parametrize("algo", ["grpo", "srpo"])
@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "dr_grpo"])
def test_on_an_autoregressive_policy_it_is_grpo(algo, loss_type):
    policy = tiny_policy("ar", seed=1)
    group = completed(policy, weights=True)
    metrics, ours = step(policy, [group], algo, loss_type=loss_type)
    policy.model.zero_grad()
    loss = plain_loss(policy, group, loss_type, algo == "srpo")
    loss.backward()
    assert torch.allclose(ours, gradient_of(policy), rtol=1e-6, atol=1e-9)
    assert float(ours.norm()) > 1e-3
    assert metrics["loss"] == pytest.approx(float(loss.detach()), abs=1e-9)
    assert metrics["ratio"] == 1.0


@pytest.mark.parametrize("family", ["ar", "llada"])
def test_a_group_with_equal_rewards_has_no_gradient(family):
    policy = tiny_policy(family, seed=1)
    group = completed(policy, rewards=(1, 1, 1, 1), weights=True)
    assert not step(policy, [group], "srpo")[1].any()
    assert step(policy, [completed(policy, weights=True)], "srpo")[1].any()


@pytest.mark.parametrize("weighted", [False, True])
def test_on_a_diffusion_policy_the_gradient_at_ratio_one_is_that_of_the_elbo(weighted):
    """All masks of three tokens: weight_k = K / (l C(3, l)) makes the mean over masks the ELBO."""
    policy, prompt, completion = tiny_policy("llada", seed=1), [4, 8], [3, 6, 5]
    subsets = [c for size in (1, 2, 3) for c in combinations(range(3), size)]
    hidden = torch.tensor([[t in subset for t in range(3)] for subset in subsets])
    shares = [1 / (len(subset) * comb(3, len(subset))) for subset in subsets]
    weights = torch.tensor(shares, dtype=torch.float64) * len(subsets)
    example = Example(prompt, completion, MaskSet(hidden, weights, torch.ones(3).bool()))
    w = torch.tensor([[0.5, 2.0, 1.25]] if weighted else [[1.0, 1.0, 1.0]], dtype=torch.float64)
    now = log_probs(policy, [example], 8)
    scores = Scores(
        now.clone().requires_grad_(),
        now,
        now,
        hidden[None],
        weights[None],
        torch.tensor([3.0], dtype=torch.float64),
        torch.tensor([-0.7], dtype=torch.float64),
        torch.tensor([0]),
        token_weights=w,
    )
    loss = make_objective("srpo", loss_type="dr_grpo", max_length=1).loss(scores)
    (coefficients,) = torch.autograd.grad(loss, scores.current)
    policy.model.zero_grad()
    accumulate_gradient(policy, [example], coefficients, 8)
    ours = gradient_of(policy)

    policy.model.zero_grad()
    elbo = 0.0
    for subset, share in zip(subsets, shares, strict=True):
        ids = torch.tensor([[*prompt, *completion]])
        ids[0, [2 + t for t in subset]] = policy.mask_id
        log_p = policy.model(input_ids=ids).logits[0].log_softmax(-1)
        elbo = elbo + share * sum(w[0, t] * log_p[2 + t, completion[t]] for t in subset)
    (0.7 * elbo).backward()  # ascent of A ELBO is descent of -A ELBO
    assert torch.allclose(ours, gradient_of(policy), rtol=1e-6, atol=1e-9)


# What rollout recorded.


def sampled(policy, temperature=1.0, batch_size=3):
    settings = Sampling(gen_length=5, block_length=5, steps=5, temperature=temperature)
    prompts = [Record(id=f"p{n}", prompt=text) for n, text in enumerate(("12=", "4"))]
    records = list(rollout(prompts, policy, settings, 3, 7, batch_size))
    for record in records:
        record["reward"] = record["sample"] % 2
    return [records[:3], records[3:]]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 3.0])
def test_rollout_records_what_scoring_finds(temperature):
    policy = tiny_policy("ar", seed=1)
    groups = sampled(policy, temperature)
    lengths = set()
    for record in (record for group in groups for record in group):
        prompt, completion = record["tokens"]["prompt"], record["tokens"]["completion"]
        lengths.add(len(completion))
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0]
        at = torch.arange(len(completion)) + len(prompt) - 1
        expected = logits.log_softmax(-1)[at, torch.tensor(completion)]
        assert record["rollout"]["log_probs"] == pytest.approx(expected.tolist(), abs=1e-6)
    if temperature == 3.0:
        assert len(lengths) > 1  # some end before the others of their batch
    assert "log_probs" not in sampled(tiny_policy())[0][0]["rollout"]


def without_log_probs(groups):
    cut = [[Record(r, rollout=dict(r["rollout"])) for r in group] for group in groups]
    for record in (record for group in cut for record in group):
        del record["rollout"]["log_probs"]
    return cut


def test_right_after_sampling_the_ratio_is_one():
    policy = tiny_policy("ar", seed=1)
    groups = sampled(policy)
    recorded, by_recorded = step(policy, groups)
    scored, by_scored = step(policy, without_log_probs(groups))
    assert recorded["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert recorded["loss"] == pytest.approx(scored["loss"], abs=1e-5)
    assert torch.allclose(by_recorded, by_scored, rtol=1e-4, atol=1e-6)


def test_recorded_log_probabilities_are_those_of_the_policy_that_sampled():
    sampler, policy = tiny_policy("ar", seed=1), tiny_policy("ar", seed=2)
    groups = sampled(sampler)
    metrics, gradient = step(policy, groups)
    assert abs(metrics["ratio"] - 1) > 0.01
    # The same as an inner step that begins from the sampler and has come to the policy.
    before = without_log_probs(groups)
    frozen = Reference("r", lambda examples: log_probs(sampler, examples, 8))
    objective = make_objective("grpo")
    batching = Batching(PLAN, scale="group", inner=2)
    moving = tiny_policy("ar", seed=1)
    steps = policy_gradients(moving, frozen, before, objective, batching, 3)
    next(steps)
    moving.model.load_state_dict(policy.model.state_dict())
    moving.model.zero_grad()
    assert next(steps)["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
    assert torch.allclose(gradient, gradient_of(moving), rtol=1e-4, atol=1e-6)


def test_what_was_not_recorded_of_every_token_is_scored():
    policy = tiny_policy("ar", seed=1)
    groups = sampled(tiny_policy("ar", seed=2))
    groups[1][0]["rollout"]["log_probs"].pop()
    assert step(policy, groups)[0]["ratio"] == 1.0
    # Other algorithms, and a diffusion policy, do not look at it.
    groups = sampled(tiny_policy("ar", seed=2))
    assert step(policy, groups, "espo", beta=0.0)[0]["clipped"] == 0.0
    assert step(tiny_policy(seed=1), groups)[0]["ratio"] == 1.0


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "'weights' is missing, expected 3 positive numbers"),
        ([1.0, 1.0], "'weights' is something else"),
        ([1.0, 0.0, 1.0], "'weights' is something else"),
        ([1.0, -1.0, 1.0], "'weights' is something else"),
        ([1.0, None, 1.0], "'weights' is something else"),
        ([1.0, float("inf"), 1.0], "'weights' is something else"),
        ([1.0, True, 1.0], "'weights' is something else"),
        (2.0, "'weights' is something else"),
    ],
)
def test_srpo_asks_for_a_positive_weight_of_every_token(weights, message):
    policy = tiny_policy("ar", seed=1)
    group = completed(policy, weights=True)
    group[0]["weights"], group[0].where = weights, "a.jsonl:1"
    with pytest.raises(DataError, match=f"a.jsonl:1: field {message}.*advantage --algo srpo"):
        step(policy, [group], "srpo")
    step(policy, [group], "grpo")


def test_weights_reach_the_tokens_that_they_stand_for():
    policy = tiny_policy("ar", seed=1)
    group = completed(policy, weights=True)
    doubled = [Record(r, weights=[2 * w for w in r["weights"]]) for r in group]
    once, twice = step(policy, [group], "srpo"), step(policy, [doubled], "srpo")
    assert torch.allclose(2 * once[1], twice[1], rtol=1e-9)
    assert twice[0]["weight"] == pytest.approx(2 * once[0]["weight"])
    assert twice[0]["adv_abs_ratio"] == pytest.approx(2 * once[0]["adv_abs_ratio"])
    # The weight of a token behind the end-of-sequence counts for nothing.
    group[1]["weights"] = [*group[1]["weights"][:2], 50.0, 70.0]
    assert torch.equal(step(policy, [group], "srpo")[1], once[1])


def test_the_pipe_trains_an_autoregressive_model(tmp_path):
    """Ones are rewarded: what each stage writes is what the next one takes."""
    model, samples, verified = (tmp_path / n for n in ("model", "samples.jsonl", "verified.jsonl"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"id": "a", "prompt": "0", "answer": "1"}\n')
    run = tmp_path / "run"

    def done(*line):
        result = invoke(*line)
        assert result.exit_code == 0, result.output
        return result

    def share_of_ones():
        sampling = ("-n", "64", "--temperature", "1", "-o", samples)
        done("rollout", "-m", run if run.exists() else model, *sampling, prompts)
        done("verify", "--verifier", "exact", "-o", verified, samples)
        return sum(r["reward"] for r in read_jsonl(verified)) / 64

    done("init", model, "--family", "ar", "--alphabet", "01", "--gen-length", "1", "--steps", "1")
    before = share_of_ones()
    assert all(len(r["rollout"]["log_probs"]) == 1 for r in read_jsonl(samples))
    for _ in range(3):
        done("update", "--algo", "grpo", "--lr", "1e-2", "--inner", "3", "-o", run, verified)
        after = share_of_ones()
    assert after > before + 0.2
    metrics = read_jsonl(run / "metrics.jsonl")
    assert len(metrics) == 9
    assert metrics[0]["algo"] == "grpo"
    assert metrics[0]["ratio"] == pytest.approx(1, abs=1e-5)
    assert metrics[2]["ratio"] != 1

    records = read_jsonl(verified)
    line = ("update", "--algo", "srpo", "-m", model, "-o", tmp_path / "weighted", verified)
    refused = invoke(*line)
    assert refused.exit_code == 65
    assert "verified.jsonl:1: field 'weights' is missing" in refused.output
    from dlmctl.records.jsonl import write_records

    write_records([{**r, "weights": [1.5]} for r in records], str(verified))
    metrics = done(*line).stdout
    assert '"weight":1.5' in metrics
