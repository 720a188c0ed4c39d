"""Tokens that end a completion: of the tokenizer, of generation_config.json, and of a turn."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import greedy_records, read_jsonl, tiny_policy
from transformers import AutoModelForCausalLM

from dlmctl.diffusion.proposals import predict_tokens
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import Sampler


def saved(directory, family="ar", seed=0, **generation):
    policy = tiny_policy(family, seed=seed)
    policy.model.float()
    save_policy(policy, directory)
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return str(directory)


def first_tokens(policy, prompts):
    """What greedy sampling begins with for each prompt."""
    settings = configured(policy, Sampler(gen_length=6, temperature=0.0))
    records = [Record(id=p, prompt=p) for p in prompts]
    return [r["tokens"]["completion"] for r in rollout(records, policy, settings, 1, 0, 8)]


PROMPTS = ["12", "3", "0042=", "1", "31", "2=2"]


def test_completions_end_where_transformers_ends_them(tmp_path):
    plain = load_policy(saved(tmp_path / "plain", eos_token_id=1), "cpu")
    # Tokens that come second in some completion, so that they end it early.
    ends = sorted({tokens[1] for tokens in first_tokens(plain, PROMPTS)} | {1})
    place = saved(tmp_path / "m", eos_token_id=ends)
    out = greedy_records(tmp_path, place, PROMPTS, 6)
    model = AutoModelForCausalLM.from_pretrained(place)
    lengths = set()
    for prompt, record in zip(PROMPTS, read_jsonl(out), strict=True):
        ids = torch.tensor([plain.encode_text(prompt)])
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert record["tokens"]["completion"] == made[0, ids.shape[1] :].tolist()
        assert record["rollout"]["finish"] == "eos"
        lengths.add(record["rollout"]["length"])
        assert not set(plain.encode_text(record["completion"])) & set(ends)
    assert min(lengths) < 6


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        ({"eos_token_id": 1}, 1, {1}),
        ({"eos_token_id": [1, 4]}, 1, {1, 4}),
        ({"eos_token_id": [5, 4]}, 1, {1, 4, 5}),
        # Without one of its own, transformers takes that of config.json.
        ({}, [1, 6], {1, 6}),
        ({"eos_token_id": [1, 4]}, [1, 6], {1, 4}),
    ],
)
def test_ends_are_those_of_generation_and_of_the_tokenizer(tmp_path, generation, config, ends):
    place = saved(tmp_path / "m", **generation)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": config}))
    policy = load_policy(place, "cpu")
    assert policy.ends == ends
    assert policy.eos_id == 1
    save_policy(policy, tmp_path / "again")
    assert load_policy(str(tmp_path / "again"), "cpu").ends == ends


@pytest.mark.parametrize("value", ["x", [1, "x"], 1.5, [-1]])
def test_ends_that_are_no_tokens_are_refused(tmp_path, value):
    with pytest.raises(
        DataError, match=r"generation_config\.json: eos_token_id is neither a token id nor"
    ):
        load_policy(saved(tmp_path / "m", eos_token_id=value), "cpu")


def with_ends(**ends) -> Policy:
    return Policy(**{**vars(tiny_policy("llada", seed=3)), **ends})


def test_a_score_up_to_the_end_knows_every_end():
    policy = with_ends(other_ends=frozenset({5}))
    for completion, counted in (([4, 5, 6, 1], 2), ([4, 1, 5], 2), ([4, 6, 7], 3)):
        record = Record(id="a", prompt="1", tokens={"completion": completion})
        example = example_of(record, policy, MaskPlan(until_eos=True))
        assert int(example.masks.scored.sum()) == counted


def test_early_stopping_knows_every_end():
    policy = with_ends(other_ends=frozenset({5}))
    given = {"gen_length": 12, "block_length": 4, "temperature": 1.0}
    records = [Record(id=str(n), prompt="1") for n in range(24)]
    plain, early = (
        list(
            rollout(records, policy, configured(policy, Sampler(**given, early_stop=stop)), 1, 0, 8)
        )
        for stop in (False, True)
    )
    stopped = 0
    for a, b in zip(plain, early, strict=True):
        one, other = a["tokens"]["completion"], b["tokens"]["completion"]
        ends = [block for block in range(3) if {1, 5} & set(one[4 * block : 4 * block + 4])]
        kept = 4 * (ends[0] + 1) if ends else 12
        assert other == one[:kept] + [1] * (12 - kept)
        stopped += kept < 12 and 1 not in one[:kept]
    assert stopped


def proposals(policy, eos):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(64, 16, generator=generator, dtype=torch.float64)
    settings = configured(policy, Sampler(temperature=0.0, eos=eos))
    return predict_tokens(policy, [states], torch.zeros(64, dtype=torch.int64), settings)


def test_ends_can_be_left_out_or_decided_last():
    policy = with_ends(other_ends=frozenset({5}), turn_ends=frozenset({7}))
    token, sure = proposals(policy, "normal")
    late = torch.tensor([t in (1, 5, 7) for t in token.tolist()])
    assert late.any()
    assert not late.all()
    assert not set(proposals(policy, "never")[0].tolist()) & {1, 5}
    assert 7 in proposals(policy, "never")[0].tolist()
    again, least = proposals(policy, "late")
    assert torch.equal(token, again)
    assert torch.equal(least, torch.where(late, sure - 1e9, sure))


def test_the_turn_of_llada_ends_with_its_own_token(tmp_path):
    policy = tiny_policy("llada")
    policy.model.float()
    policy.tokenizer.add_tokens(["<|eot_id|>"], special_tokens=True)
    policy.model.resize_token_embeddings(len(policy.tokenizer))
    save_policy(policy, tmp_path)
    again = load_policy(str(tmp_path), "cpu")
    assert again.turn_ends == {len(policy.tokenizer) - 1}
    assert again.ends == {1}
