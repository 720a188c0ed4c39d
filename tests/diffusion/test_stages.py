"""The stages `rollout` and `score-elbo` as functions on streams of records."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from conftest import tiny_policy

from dlmctl.diffusion.rollout import Round, rollout
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.diffusion.scoring import MaskPlan, example_of, masks_by, score
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record

SETTINGS = SamplerConfig(gen_length=4, block_length=2, steps=4, temperature=1.0)


def sampled(policy, records, batch_size=3, on_error="fail", round_=None, settings=SETTINGS):
    return rollout(records, policy, settings, 2, 7, batch_size, on_error, round_)


def prompts(*texts):
    return [Record(id=f"p{n}", prompt=text) for n, text in enumerate(texts)]


def test_a_completion_bears_all_that_the_next_stages_need(policy):
    [first, second] = sampled(policy, prompts("12="))
    assert (first["id"], first["sample"], second["sample"]) == ("p0", 0, 1)
    assert first["tokens"]["prompt"] == policy.encode_text("12=")
    assert len(first["tokens"]["completion"]) == 4
    assert first["completion"] == policy.decode(first["tokens"]["completion"])
    made = first["rollout"]
    assert made["revision"] == policy.revision
    assert made["model"] == policy.name
    assert (made["seed"], made["samples"], made["temperature"], made["nfe"]) == (7, 2, 1.0, 4)
    assert sorted(made["order"]) == [0, 1, 2, 3]
    assert "round" not in made
    assert made["finish"] == ("eos" if policy.eos_id in first["tokens"]["completion"] else "length")
    [third, _] = sampled(policy, prompts("12="), round_=Round(3, 2, 0))
    assert (third["rollout"]["round"], third["rollout"]["round_size"]) == (3, 2)
    assert third["tokens"] != first["tokens"]  # every round has its own noise


def test_ids_of_a_prompt_are_not_tokenized_again(policy):
    ids = policy.encode_text("21")
    [record, _] = sampled(policy, [Record(id="a", prompt="12=", tokens={"prompt": ids})])
    assert record["tokens"]["prompt"] == ids


def test_fields_of_the_prompt_stay_and_a_group_leaves_in_order(policy):
    records = [Record(r, answer=n) for n, r in enumerate(prompts("1", "12", "123"))]
    done = list(sampled(policy, records, batch_size=4))
    assert [(r["answer"], r["sample"]) for r in done] == list(itertools.product(range(3), range(2)))


def test_memory_holds_one_batch_of_prompts(policy):
    taken = itertools.count()
    endless = (Record(id=n, prompt="12") for n in taken)
    stream = sampled(policy, endless, batch_size=4)
    for _ in range(4):
        next(stream)
    assert next(taken) == 2


def test_a_record_that_cannot_be_completed_keeps_its_place(policy):
    records = [*prompts("1"), Record(id="b"), Record(id="c", prompt="1x"), *prompts("2")]
    done = list(sampled(policy, records, on_error="keep"))
    assert ["error" in r for r in done] == [False, False, True, True, False, False]
    with pytest.raises(DataError, match="no 'prompt'"):
        list(sampled(policy, records))


def completed():
    return [
        Record(id=f"p{n}", sample=0, prompt="1=", completion=text)
        for n, text in enumerate(("012", "3", "2104"))
    ]


def test_every_label_is_scored_under_the_same_masks():
    policies = {"policy": tiny_policy(seed=1), "reference": tiny_policy(seed=2)}
    plan = MaskPlan(samples=4)
    together = list(score(completed(), policies, plan, 2))
    for record in together:
        entry = record["elbo"]["policy"]
        assert entry["value"] == pytest.approx(sum(entry["samples"]) / 4)
        assert entry["value"] < 0
        assert entry["masks"] == record["elbo"]["reference"]["masks"]
        assert entry["tokens"] == len(record["completion"])
    apart = list(score(completed(), {"reference": policies["reference"]}, plan, 1))
    apart = list(score(apart, {"policy": policies["policy"]}, plan, 3))
    for a, b in zip(together, apart, strict=True):
        for label in policies:
            assert a["elbo"][label]["samples"] == pytest.approx(b["elbo"][label]["samples"])


def test_the_levels_of_complementary_masks_are_spread_over_the_samples_that_rollout_drew(policy):
    def levels(samples):
        place = {} if samples is None else {"samples": samples}
        records = [
            Record(id="a", sample=i, prompt="1=", completion="0123012", rollout=place)
            for i in range(4)
        ]
        examples = [example_of(r, policy, MaskPlan("complementary", 2)) for r in records]
        return [int(example.masks.masked[0].sum()) for example in examples]

    first, *others = levels(4)
    assert others == [(first + 2 * i) % 8 for i in (1, 2, 3)]
    # Of completions from elsewhere nobody knows how many there are.
    assert levels(None) == levels(1) != levels(4)


def test_a_sample_that_is_no_number_is_refused(policy):
    record = Record(id="a", sample="one", prompt="1=", completion="01")
    with pytest.raises(DataError, match="field 'sample' is str, expected int"):
        example_of(record, policy, MaskPlan())


def test_a_score_names_all_that_its_masks_depend_on():
    policy = tiny_policy()
    plans = [
        MaskPlan(),
        MaskPlan("uniform"),
        MaskPlan(samples=2),
        MaskPlan(seed=1),
        MaskPlan(until_eos=True),
        MaskPlan(prompt_mask=0.1),
        MaskPlan(draw=1),
        MaskPlan("independent", levels=(0.1, 0.5)),
        MaskPlan("block", block_length=2),
        MaskPlan("block", block_length=3),
        # The model's own blocks.
        MaskPlan("block"),
    ]
    names = [masks_by(policy, plan) for plan in plans]
    assert all(a != b for n, a in enumerate(names) for b in names[:n])
    assert json.loads(json.dumps(names)) == names
    other = replace(policy, sampling={"block_length": 4})
    assert masks_by(other, MaskPlan("block")) == masks_by(policy, MaskPlan("block", block_length=4))
    assert masks_by(other, MaskPlan()) == masks_by(policy, MaskPlan(block_length=8)) == names[0]
    exact = [masks_by(tiny_policy("ar"), MaskPlan(until_eos=cut)) for cut in (False, True)]
    assert exact == ["exact", "exact until eos"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(id="a", prompt="1"), "'completion' is missing"),
        (Record(id="a", prompt="1", completion=""), "the completion is empty"),
        (Record(prompt="1", completion="2"), "'id' is missing"),
        (Record(id="a", completion="2"), "no 'prompt'"),
    ],
)
def test_what_cannot_be_scored_is_said(policy, record, message):
    with pytest.raises(DataError, match=message):
        list(score([record], {"a": policy}, MaskPlan(), 1))
    [kept] = score([record], {"a": policy}, MaskPlan(), 1, "keep")
    assert re.search(message, kept["error"]["message"])


def test_scoring_until_the_end_of_sequence_counts_no_token_after_it(policy):
    record = Record(
        id="a", prompt="1", tokens={"completion": [4, policy.eos_id, policy.eos_id, policy.eos_id]}
    )
    [whole] = score([Record(record)], {"a": policy}, MaskPlan(), 1)
    [cut] = score([Record(record)], {"a": policy}, MaskPlan(until_eos=True), 1)
    assert (whole["elbo"]["a"]["tokens"], cut["elbo"]["a"]["tokens"]) == (4, 2)


@pytest.mark.parametrize(
    ("option", "setting"),
    [
        ("--threshold", {"threshold": 0.9}),
        ("--factor", {"factor": 1.0}),
        ("--cache", {"cache": "dual"}),
        ("--cfg-scale", {"cfg_scale": 1.0}),
        ("--compile", {"compile": True}),
    ],
)
def test_an_autoregressive_model_refuses_what_only_denoising_has(option, setting):
    settings = SamplerConfig(gen_length=4, block_length=2, **setting)
    with pytest.raises(UsageError, match=f"{option} means nothing to"):
        list(sampled(tiny_policy("ar"), prompts("12="), settings=settings))
