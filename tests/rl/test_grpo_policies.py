"""GRPO and SRPO on models: gradients, recorded log-probabilities, and the pipe."""

from itertools import combinations
from math import comb

import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.diffusion.elbo import Example, log_probs
from dlmctl.diffusion.masks import MaskSet
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantages import Normalization, advantages
from dlmctl.rl.gradient import accumulate_gradient
from dlmctl.rl.objectives.scores import Scores
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients

PLAN = MaskPlan(until_eos=True)


def gradient_of(policy):
    parameters = policy.model.parameters()
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
    )


def step(policy, groups, algo="grpo", reference=None, compare=False, **settings):
    """Metrics and gradient of one batch."""
    policy.model.zero_grad()
    objective = make_objective(algo, **settings)
    frozen = Reference("r", lambda examples: log_probs(reference or policy, examples, 8))
    batching = Batching(PLAN, Normalization.of(algo))
    [metrics] = policy_gradients(policy, frozen, groups, objective, batching, 3, compare=compare)
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


def test_the_gradient_is_compared_with_the_one_without_weights():
    policy = tiny_policy("ar")
    group = completed(policy, weights=True)
    _, weighted = step(policy, [group], "srpo")
    _, plain = step(policy, [group], "grpo")
    metrics, gradient = step(policy, [group], "srpo", compare=True)
    assert torch.equal(gradient, weighted)
    cosine = torch.nn.functional.cosine_similarity(weighted.double(), plain.double(), dim=0)
    assert metrics["gradient_cosine"] == pytest.approx(float(cosine), abs=1e-9)
    assert 0 < cosine < 0.999
    for record in group:
        record["weights"] = [2.0] * len(record["weights"])
    metrics, _ = step(policy, [group], "srpo", compare=True)
    assert metrics["gradient_cosine"] == pytest.approx(1, abs=1e-9)
    idle = completed(policy, (1, 1, 1, 1), weights=True)
    assert step(policy, [idle], "srpo", compare=True)[0]["gradient_cosine"] is None


def plain_loss(policy, group, loss_type, weighted):
    """GRPO at ratio 1 as it is written, from whole logits."""
    [advantage] = advantages([[r["reward"] for r in group]], Normalization.of("grpo"))
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
    settings = SamplerConfig(gen_length=5, block_length=5, steps=5, temperature=temperature)
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
    batching = Batching(PLAN, Normalization.of("grpo"), inner=2)
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
    for group in groups:
        for record in group:
            del record["rollout"]["revision"]  # as if sampled from the weights of now
    assert step(policy, groups)[0]["ratio"] == 1.0
    # Other algorithms, and a diffusion policy, do not look at it.
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
