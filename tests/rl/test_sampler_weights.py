"""Ratios are taken to the weights that completions were sampled from."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from conftest import invoke, read_jsonl

from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import fixed_name, load_policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, write_records
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching
from dlmctl.rl.samplers import Samplers
from dlmctl.rl.update import update_policy
from dlmctl.settings.algorithms import Reinforcement
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.run import open_run
from dlmctl.train.run_directory import latest_checkpoint

PLAN = MaskPlan("complementary", 2)


def records(first, groups, policy, **place):
    """Groups of two samples; every other one is the same again, so that steps add up."""
    return [
        Record(
            id=f"p{number}",
            sample=i,
            reward=float(i),
            tokens={
                "prompt": [3 + number % 2, 8],
                "completion": [3 + (2 * (number % 2) + i + 1) * k % 11 for k in range(5)],
            },
            rollout={
                "samples": 2,
                "model": policy.name,
                "revision": policy.revision,
                **place,
            },
        )
        for number in range(first, first + groups)
        for i in range(2)
    ]


def opened(directory, model, algo="espo", rank=0, rate=0.03):
    return open_run(
        directory, model, algo, Optimizer(rate, max_norm=10.0), Adapter(rank), "cpu",
        "auto", False, seed=0,
    )  # fmt: skip


def steps(run, stream, algo="espo", inner=1, save_every=100, any_policy=False, **settings):
    """Metrics of one batch of two groups after the other."""
    objective = make_objective(algo, **settings)
    batching = Batching(PLAN, inner=inner)
    return update_policy(stream, run, objective, batching, 2, 8, save_every, 2, any_policy)


def token_scores(policy, rows, plan=PLAN):
    """log p of the target tokens [N, K, G], with targets and weights, from whole logits."""
    scores, targets, weights = [], [], []
    for record in rows:
        example = example_of(record, policy, plan)
        prompt, completion = len(example.prompt), torch.tensor(example.completion)
        ids = torch.tensor([[*example.prompt, *example.completion]] * len(example.masks.masked))
        ids[:, prompt:] = completion.where(~example.masks.masked, policy.mask_id)
        with torch.no_grad():
            logits = policy.model(input_ids=ids).logits[:, prompt:].log_softmax(-1)
        own = logits.gather(2, completion.expand(len(ids), -1)[:, :, None])[:, :, 0]
        scores.append(own.double() * example.masks.masked)
        targets.append(example.masks.masked)
        weights.append(example.masks.weights)
    return torch.stack(scores), torch.stack(targets), torch.stack(weights)


def espo_by_hand(policy, sampler, rows, clip):
    """Loss without penalty, and the share of the ratios that the clip holds."""
    now, _, weights = token_scores(policy, rows)
    then, _, _ = token_scores(sampler, rows)
    ratio = ((weights * (now - then).sum(dim=2)).mean(dim=1) / now.shape[2]).exp()
    advantage = torch.tensor([r["reward"] - 0.5 for r in rows], dtype=torch.float64)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    held = (advantage > 0) & (ratio > 1 + clip) | (advantage < 0) & (ratio < 1 - clip)
    return float(-surrogate.mean()), float(held.double().mean())


def diffu_grpo_by_hand(policy, sampler, rows, clip):
    now, targets, _ = token_scores(policy, rows)
    then, _, _ = token_scores(sampler, rows)
    ratio = (now - then).exp()
    advantage = torch.tensor([r["reward"] - 0.5 for r in rows], dtype=torch.float64)
    advantage = advantage[:, None, None].expand_as(ratio)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    held = (advantage > 0) & (ratio > 1 + clip) | (advantage < 0) & (ratio < 1 - clip)
    return float(-surrogate[targets].mean()), float(held[targets].double().mean())


BY_HAND = {"espo": espo_by_hand, "diffu-grpo": diffu_grpo_by_hand}


def frozen(policy):
    return replace(policy, model=copy.deepcopy(policy.model).eval())


def check(metrics, algo, policy, sampler, rows, clip=0.02):
    loss, held = BY_HAND[algo](policy, sampler, rows, clip)
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["clipped"] == pytest.approx(held)
    assert held > 0
    fresh, _ = BY_HAND[algo](policy, policy, rows, clip)
    assert abs(loss - fresh) > 1e-3


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("algo", ["espo", "diffu-grpo"])
def test_the_second_batch_of_a_round_is_compared_with_the_sampler(
    tmp_path, saved_models, algo, rank
):
    run = opened(tmp_path / "run", saved_models("llada"), algo, rank)
    sampler = frozen(run.policy)
    rows = records(0, 6, sampler, round=0, round_size=12)
    made = steps(run, rows, algo, beta=0.0, clip=0.02)
    assert next(made)["clipped"] == 0
    for start in (4, 8):
        moved = frozen(run.policy)
        check(next(made), algo, moved, sampler, rows[start : start + 4])


def test_with_a_lag_a_round_is_compared_with_the_weights_of_the_round_before(
    tmp_path, saved_models
):
    run = opened(tmp_path / "run", saved_models("llada"))
    samplers = [frozen(run.policy)]
    sampled = []

    def rounds():
        for number in range(4):
            # As 'rollout --max-lag 1' has it, which samples a round while the last one trains.
            sampler = samplers[max(0, number - 1)]
            place = {"round": number, "round_size": 4, "max_lag": 1}
            sampled.append(records(2 * number, 2, sampler, **place))
            yield from sampled[-1]

    made = steps(run, rounds(), beta=0.0, clip=0.02)
    assert next(made)["clipped"] == 0
    for number in range(1, 4):
        moved = frozen(run.policy)
        metrics = next(made)
        check(metrics, "espo", moved, samplers[number - 1], sampled[number])
        samplers.append(moved)
        # What was published behind the last round: its revision is known only now.
        samplers[number] = replace(moved, revision=run.revisions[number])


def test_inner_steps_have_the_sampler_as_it_is_under_their_masks(tmp_path, saved_models):
    run = opened(tmp_path / "run", saved_models("llada"))
    sampler = frozen(run.policy)
    rows = records(0, 4, sampler)
    made = steps(run, rows, inner=2, beta=0.0, clip=0.02)
    next(made), next(made), next(made)
    moved = frozen(run.policy)
    now, _, weights = token_scores(moved, rows[4:], replace(PLAN, draw=2))
    then, _, _ = token_scores(sampler, rows[4:], replace(PLAN, draw=2))
    ratio = ((weights * (now - then).sum(dim=2)).mean(dim=1) / 5).exp()
    advantage = torch.tensor([-0.5, 0.5] * 2, dtype=torch.float64)
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.98, 1.02) * advantage).mean()
    assert next(made)["loss"] == pytest.approx(float(loss), abs=1e-5)


def test_weights_change_places_and_come_back(tmp_path, saved_models):
    run = opened(tmp_path / "run", saved_models("llada"))
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    samplers, kept = Samplers(run, 8), [torch.zeros_like(p) for p in before.values()]

    def fail():
        with samplers._exchanged(kept):
            assert not any(p.any() for p in run.parameters.values())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(run.parameters[name], p) for name, p in before.items())
    assert not any(p.any() for p in kept)


def test_weights_are_kept_only_where_batches_sampled_from_them_may_follow(tmp_path, saved_models):
    from dlmctl.rl.batches import StepBatch

    run = opened(tmp_path / "run", saved_models("llada"))

    def kept(finished, revision=run.policy.revision, **place):
        samplers = Samplers(run, 8)
        rows = records(0, 1, replace(run.policy, revision=revision), **place)
        samplers.keep(StepBatch([rows], 0, finished))
        return [*samplers._kept]

    assert kept(0, round=0) == kept(None, "other") == []
    assert kept(None, round=0) == kept(0, round=0, max_lag=1) == kept(None)
    assert kept(None) == [run.policy.revision]


# A run that was cut, and weights of elsewhere.


def published(tmp_path, saved_models, algo="espo"):
    """A run with a step behind it, and completions sampled from its checkpoint."""
    run = opened(tmp_path / "run", saved_models("llada"), algo)
    list(steps(run, records(0, 2, run.policy), algo))
    sampler = load_policy(fixed_name(str(tmp_path / "run")), "cpu")
    return sampler, records(10, 4, sampler)


def test_a_loop_of_short_pipes_is_compared_with_what_each_began_from(tmp_path, saved_models):
    sampler, rows = published(tmp_path, saved_models)
    for row in rows:
        row["rollout"]["model"] = "nowhere"  # the copy in memory is enough
    run = opened(tmp_path / "run", None)
    made = steps(run, rows, beta=0.0, clip=0.02, save_every=1)
    assert next(made)["clipped"] == 0
    moved = frozen(run.policy)
    check(next(made), "espo", moved, sampler, rows[4:])


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_that_was_cut_between_two_batches_resumes_with_the_sampler(
    tmp_path, saved_models, begun
):
    """The weights that sampled are the reference, or a checkpoint that is still there."""
    if begun:
        sampler, rows = published(tmp_path, saved_models)
    else:
        sampler = load_policy(saved_models("llada"), "cpu")
        rows = records(10, 4, sampler)
    first = opened(tmp_path / "run", sampler.name)
    made = steps(first, rows, save_every=1, beta=0.0, clip=0.02)
    next(made)
    made.close()
    run = opened(tmp_path / "run", None)
    moved = frozen(run.policy)
    check(next(steps(run, rows[4:], beta=0.0, clip=0.02)), "espo", moved, sampler, rows[4:])


def test_where_the_weights_are_gone_the_batch_is_refused(tmp_path, saved_models):
    _, rows = published(tmp_path, saved_models)
    first = opened(tmp_path / "run", None)
    list(steps(first, rows[:4]))
    for row in rows:
        row.where = "x.jsonl:5"
    # The name is that of the run, which has gone on.
    moved_on = [Record(r, rollout={**r["rollout"], "model": str(tmp_path / "run")}) for r in rows]
    run = opened(tmp_path / "run", None)
    with pytest.raises(DataError, match=r"has others now.*sample again from this run"):
        next(steps(run, moved_on[4:]))
    checkpoint = latest_checkpoint(tmp_path / "run")
    nowhere = [Record(r, rollout={**r["rollout"], "model": str(tmp_path / "no")}) for r in rows]
    given = tmp_path / "given.jsonl"
    write_records(nowhere[4:], str(given))
    refused = invoke("update", "--algo", "espo", "-o", tmp_path / "run", given)
    assert refused.exit_code == 65
    assert "given.jsonl:1: --algo espo takes ratios to the weights that this was sampled from" in (
        refused.output
    )
    assert latest_checkpoint(tmp_path / "run") == checkpoint


def test_algorithms_without_ratios_take_completions_of_any_weights(tmp_path, saved_models):
    without = [a for a in get_args(Reinforcement) if make_objective(a).needs != "ratios"]
    assert sorted(without) == ["reinforce", "rspo", "spg", "vrpo", "wd1"]
    sampler = replace(load_policy(saved_models("llada"), "cpu"), name="nowhere", revision="gone")
    for algo in without:
        run = opened(tmp_path / algo, saved_models("llada"), algo)
        assert len(list(steps(run, records(0, 4, sampler), algo))) == 2
    run = opened(tmp_path / "espo", saved_models("llada"))
    with pytest.raises(DataError) as refused:
        next(steps(run, records(0, 4, sampler)))
    named = str(refused.value).partition("takes no ratios (")[2].partition(")")[0]
    assert {*named.split(", "), "reinforce"} == {*without}


def test_completions_of_another_model_are_compared_with_it(tmp_path, saved_models):
    """--any-policy, or completions that no round has."""
    other = opened(tmp_path / "other", saved_models("llada"), rate=0.05)
    reversed_ = [Record(r, reward=1 - r["reward"]) for r in records(30, 4, other.policy)]
    list(steps(other, reversed_))
    sampler = load_policy(fixed_name(str(tmp_path / "other")), "cpu")
    rows = records(0, 2, sampler, round=7, round_size=4)
    run = opened(tmp_path / "run", saved_models("llada"))
    own = frozen(run.policy)
    [metrics] = steps(run, rows, any_policy=True, beta=0.0, clip=0.02)
    check(metrics, "espo", own, sampler, rows)


def test_completions_that_do_not_say_where_they_are_from_are_as_sampled_now(tmp_path, saved_models):
    run = opened(tmp_path / "run", saved_models("llada"))
    rows = [Record(r, rollout={"samples": 2}) for r in records(0, 4, run.policy)]
    assert [m["clipped"] for m in steps(run, rows, beta=0.0)] == [0, 0]


def test_recorded_log_probabilities_need_no_weights(tmp_path, saved_models):
    run = opened(tmp_path / "run", saved_models("ar"), "grpo")
    rows = records(0, 4, replace(run.policy, name="nowhere", revision="gone"))
    for row in rows:
        row["rollout"]["log_probs"] = [-1.0] * 5
    assert len(list(steps(run, rows, "grpo"))) == 2
    del rows[5]["rollout"]["log_probs"]
    with pytest.raises(DataError, match="takes ratios to the weights"):
        list(steps(run, rows, "grpo"))


def test_a_loop_in_one_pipe_clips_in_the_batches_behind_the_first(tmp_path, saved_models):
    """A round of four prompts in two batches, from `rollout --follow`."""
    given = tmp_path / "given.jsonl"
    run = tmp_path / "run"
    model = saved_models("llada")
    follow = ("--follow", run, "-m", model, "--rounds", "1", "--prompts", "4")
    sampling = ("-n", "4", "--gen-length", "8", "--task", "sudoku", "--temperature", "3")
    done = invoke("rollout", *follow, *sampling, "-o", tmp_path / "sampled.jsonl")
    assert done.exit_code == 0, done.output
    rows = [
        Record(row, reward=float(row["sample"] % 2))
        for row in read_jsonl(tmp_path / "sampled.jsonl")
    ]
    write_records(rows, str(given))
    options = ("--algo", "espo", "--inner", "1", "--lr", "0.03", "--prompts-per-step", "2")
    done = invoke("update", *options, "--clip", "0.02", "-m", model, "-o", run, given)
    assert done.exit_code == 0, done.output
    clipped = [row["clipped"] for row in read_jsonl(run / "metrics.jsonl")]
    assert clipped[0] == 0 < clipped[1]
