"""Scores that records have are taken if they are what the step would compute, and only then."""

from dataclasses import replace

import pytest
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan, score
from dlmctl.records.jsonl import Record, write_records
from dlmctl.rl import recorded
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.settings.mask_laws import ALL

PLAN = MaskPlan(samples=2)


@pytest.fixture(autouse=True)
def nothing_said():
    recorded._say.cache_clear()


def group():
    return [
        Record(
            id="p",
            sample=i,
            reward=float(i % 2),
            tokens={"prompt": [3, 4], "completion": [3 + (i + j) % 5 for j in range(4)]},
        )
        for i in range(4)
    ]


def pair(family="llada"):
    return (
        replace(tiny_policy(family, seed=1), revision="now"),
        replace(tiny_policy(family, seed=2), revision="then"),
    )


def scored(plan=PLAN, family="llada", shift=1.0):
    """Records with scores; those of the policy are `shift` nats off, to know them by."""
    policy, reference = pair(family)
    records = list(score(group(), {"policy": policy, "reference": reference}, plan, 8))
    for record in records:
        samples = record["elbo"]["policy"]["samples"]
        record["elbo"]["policy"]["samples"] = [value + shift for value in samples]
    return records


def kl(records, plan=PLAN, family="llada", policy=None, steps=1, **batching):
    """Mean score of policy less reference, as a step on the records sees it."""
    own, reference = pair(family)
    policy = policy or own
    frozen = Reference("then", lambda examples: log_probs(reference, examples, 8))
    settings = Batching(plan, inner=steps, **batching)
    gradients = policy_gradients(policy, frozen, [records], make_objective("rspo"), settings, 8)
    return [metrics["kl"] for metrics in gradients]


def test_scores_of_the_same_masks_and_weights_are_taken(capsys):
    [computed] = kl(group())
    [taken] = kl(scored())
    assert taken == pytest.approx(computed + 1)
    assert not capsys.readouterr().err


def test_scores_of_decodings_with_different_numbers_of_steps_are_taken(capsys):
    plan = MaskPlan("trajectory", ALL)
    records = group()
    for i, record in enumerate(records):
        record["rollout"] = {"order": [t // (1 + i) for t in range(4)]}
    [computed] = kl(records, plan)
    policy, reference = pair()
    held = list(score(records, {"policy": policy, "reference": reference}, plan, 8))
    assert len({len(record["elbo"]["policy"]["samples"]) for record in held}) == 3
    for record in held:
        entry = record["elbo"]["policy"]
        entry["samples"] = [value + 1.0 for value in entry["samples"]]
    [taken] = kl(held, plan)
    assert taken == pytest.approx(computed + 1)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (MaskPlan("full", 1), "law full instead of stratified, samples 1 instead of 2"),
        (MaskPlan(samples=4), "samples 4 instead of 2"),
        (replace(PLAN, seed=3), "seed 3 instead of 0"),
        (replace(PLAN, until_eos=True), "until_eos True instead of False"),
        (replace(PLAN, prompt_mask=0.5), "prompt_mask 0.5 instead of 0.0"),
        (replace(PLAN, draw=1), "draw 1 instead of 0"),
    ],
)
def test_scores_under_other_masks_are_made_again_and_that_is_said_once(capsys, plan, told):
    [computed] = kl(group())
    for _ in range(2):
        assert kl(scored(plan)) == [computed]
    said = capsys.readouterr().err
    assert said.count("scores 'policy' of the records are not used") == 1
    assert f"under other masks, {told}; give" in said
    assert "policy and reference are scored again" in said


def test_blocks_of_another_length_are_other_masks(capsys):
    plan = MaskPlan("block", 2, block_length=2)
    taken, own = (kl(scored(replace(plan, block_length=n)), plan) for n in (2, 3))
    [computed] = kl(group(), plan)
    assert (taken, own) == ([pytest.approx(computed + 1)], [computed])
    assert "block_length 3 instead of 2" in capsys.readouterr().err


def test_an_exact_score_until_the_end_of_sequence_is_another(capsys):
    plan = MaskPlan(until_eos=True)
    [computed] = kl(group(), family="ar")
    assert kl(scored(plan, "ar"), family="ar") == [computed]
    assert "other masks, exact until eos instead of exact;" in capsys.readouterr().err
    assert kl(scored(family="ar"), family="ar") == [pytest.approx(computed + 1)]


def test_scores_of_other_weights_are_made_again(capsys):
    """As those of a batch behind the first of a file that was scored before the run."""
    moved = replace(tiny_policy(seed=3), revision="later")
    [computed] = kl(group(), policy=moved)
    assert kl(scored(), policy=moved) == [computed]
    records = scored()
    records[2]["elbo"]["reference"]["revision"] = "before"
    assert kl(records) == kl(group())
    told = capsys.readouterr().err
    for label in ("policy", "reference"):
        assert f"scores '{label}' of the records are not used (they were made by other w" in told


def test_a_second_step_on_a_batch_takes_no_scores():
    """Its masks are others, and the policy has moved."""
    shifted = kl(scored(), steps=2)
    computed = kl(group(), steps=2)
    assert shifted[0] == pytest.approx(computed[0] + 1)
    assert shifted[1] == computed[1] != computed[0]


def test_a_residual_with_masks_of_its_own_takes_none_of_the_first_masks():
    independent = kl(group(), independent_residual=True)
    assert kl(scored(), independent_residual=True) == independent != kl(group())


def test_where_some_records_lack_scores_all_are_made(capsys):
    records = scored()
    del records[1]["elbo"]
    assert kl(records) == kl(group())
    assert (
        "'policy' of the records are not used (some records lack them)" in capsys.readouterr().err
    )
    records = scored()
    records[0]["elbo"]["policy"] = "none"
    assert kl(records) == kl(group())


def test_the_stages_say_that_their_masks_differ(tmp_path, saved_models):
    model, given = saved_models("llada"), tmp_path / "given.jsonl"
    rows = [
        Record(r, tokens={"prompt": [3, 4], "completion": r["tokens"]["completion"]})
        for r in group()
    ]
    write_records(rows, str(given))

    def trained(name, *options):
        scores = tmp_path / f"{name}.jsonl"
        labels = ("-m", f"policy={model}", "-m", f"reference={model}")
        assert invoke("score-elbo", *labels, *options, "-o", scores, given).exit_code == 0
        done = invoke("update", "-m", model, "-o", tmp_path / name, scores)
        assert done.exit_code == 0, done.output
        return done.stderr, read_jsonl(tmp_path / name / "metrics.jsonl")[0]["loss"]

    same, loss = trained("same")
    assert "scored again" not in same
    other, again = trained("other", "--masks", "full", "-k", "1")
    assert "law full instead of stratified, samples 1 instead of 4" in other
    assert again == loss
