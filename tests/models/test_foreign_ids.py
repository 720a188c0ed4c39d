"""Ids of one model's tokenizer are not read by a model with another."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.diffusion.scoring import MaskPlan, score
from dlmctl.memorization.text.membership import likelihoods, sama_scores
from dlmctl.models.policy import Policy, check_same_tokens
from dlmctl.models.saving import save_policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.recorded import recorded_difference
from dlmctl.sae.corpus import MaskLaw, documents, masked_corpus
from dlmctl.sae.evaluation.stability import stability
from dlmctl.settings.memorization import Sama
from dlmctl.settings.sae import Insertion

OWN, OTHER = "01234=", "=43210"


def same_function() -> tuple[Policy, Policy]:
    """Two models that say the same of every text, with the ids of the characters in two orders."""
    own, other = tiny_policy(alphabet=OWN), tiny_policy(alphabet=OTHER)
    moved = {name: tensor.clone() for name, tensor in own.model.state_dict().items()}
    vocabulary = other.tokenizer.get_vocab()
    for name, tensor in moved.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            for token, number in own.tokenizer.get_vocab().items():
                moved[name][vocabulary[token]] = own.model.state_dict()[name][number]
            assert tensor is moved[name]
    other.model.load_state_dict(moved)
    return own, other


def texts() -> list[Record]:
    return [Record(id=f"t{n}", prompt="=", completion=t) for n, t in enumerate(("0123401", "4432"))]


def sampled(policy: Policy) -> list[Record]:
    """As `rollout` writes them."""
    made = []
    for record in texts():
        ids = {"prompt": policy.encode(record), "completion": policy.encode_completion(record)}
        made.append(Record(record, tokens=ids))
    return made


def test_a_membership_reference_reads_texts_and_not_another_models_ids() -> None:
    own, other = same_function()
    plan = MaskPlan(samples=4)
    first, second = (likelihoods(policy, texts(), plan, 2) for policy in (own, other))
    torch.testing.assert_close(first, second)  # each by its own tokenizer
    for records in (texts(), sampled(own)):
        with pytest.raises(UsageError, match=r"different tokenizers \(id 3 is '0' .*'=' in"):
            sama_scores(own, other, records, Sama(), 2)
    with pytest.raises(DataError, match="do not read as its completion"):
        likelihoods(other, sampled(own), plan, 2)
    torch.testing.assert_close(likelihoods(own, sampled(own), plan, 2), first)


def test_more_tokens_do_no_harm_where_none_is_used() -> None:
    own, more = tiny_policy(alphabet=OWN), tiny_policy(alphabet=OWN + "5")
    check_same_tokens(own, more, own.encode_text(OWN))
    with pytest.raises(UsageError, match="id 9 is None in one, '5' in the other"):
        check_same_tokens(own, more, more.encode_text("5"))
    assert sama_scores(own, more, texts(), Sama(), 2).shape == (2,)


def test_ids_are_taken_as_they_are_where_they_read_as_the_text() -> None:
    policy = tiny_policy(alphabet=OWN)
    end = policy.eos_id
    assert end is not None
    [ids] = [policy.encode_text("0123401")]
    record = Record(prompt="=", completion="0123401", tokens={"completion": [*ids, end, end]})
    assert policy.encode_completion(record) == [*ids, end, end]
    assert policy.encode_completion(Record(prompt="=", completion="0123401")) == ids
    # As of a model with the same tokenizer that ends elsewhere.
    other = dataclasses.replace(policy, eos_id=None)
    assert other.encode_completion(record) == [*ids, end, end]
    beyond = Record(record, tokens={"completion": [*ids, end, *ids]})
    for each in (policy, other):
        assert each.encode_completion(beyond) == [*ids, end, *ids]
    assert policy.encode_completion(Record(tokens={"completion": ids})) == ids
    assert policy.encode(Record(record, tokens={"prompt": ids[:2]})) == ids[:2]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"completion": [3, 4]}, "do not read as its completion"),
        ({"completion": [3, 99]}, "tokens.completion contains ids beyond the vocabulary"),
        ({"completion": [-1]}, "tokens.completion contains ids beyond"),
        ({"completion": [True]}, "tokens.completion is not a list"),
        ({"completion": "01"}, "tokens.completion is not a list"),
        ({"completion": 0}, "tokens.completion is not a list"),
        ({"prompt": [9]}, "tokens.prompt contains ids beyond"),
        ([3], "'tokens' is list"),
    ],
)
def test_ids_that_cannot_be_its_own_are_refused(tokens: Any, message: str) -> None:
    policy = tiny_policy(alphabet=OWN)
    record = Record(id="a", prompt="=", completion="0123401", tokens=tokens)
    record.where = "r.jsonl:3"
    for read in (policy.encode, policy.encode_completion):
        with pytest.raises(DataError, match=f"r.jsonl:3: .*{message}"):
            read(record)


def test_scores_of_two_tokenizers_are_not_subtracted(capsys: pytest.CaptureFixture[str]) -> None:
    own, plan = tiny_policy(alphabet=OWN), MaskPlan()
    [record] = score(texts()[:1], {"policy": own, "reference": own}, plan, 1)
    taken = recorded_difference([record], own, own.revision, plan)
    assert taken is not None
    assert taken.tolist() == [[0.0] * 4]
    record["elbo"]["reference"]["tokens"] -= 1
    assert recorded_difference([record], own, own.revision, plan) is None
    assert "of 7 and of 6 tokens" in capsys.readouterr().err


def test_stability_is_of_models_with_one_tokenizer() -> None:
    own, other = same_function()
    batches = list(masked_corpus(documents(texts(), own, 99), own, MaskLaw(0.5, 0.5), 2))
    with pytest.raises(UsageError, match="different tokenizers"):
        stability(own, other, batches, [], Insertion(), {})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two models, and records that the first one sampled."""
    made = tmp_path_factory.mktemp("foreign")
    for name, policy in zip(("own", "other"), same_function(), strict=True):
        policy.model.float()
        save_policy(policy, made / name)
    records = sampled(tiny_policy(alphabet=OWN))
    more = {"sample": 0, "advantage": 1.0, "reward": 1.0}
    lines = [orjson.dumps(dict(record) | more) for record in records for _ in range(2)]
    (made / "r.jsonl").write_bytes(b"\n".join(lines))
    return made


@pytest.mark.parametrize(
    "command",
    [
        "score-elbo",
        "rollout -n 1",
        "memo-eval text",
        "sae-activations -o OUT",
        "update --algo sft -o OUT --prompts-per-step 1",
        "distill masked -o OUT --records-per-step 1",
        "advantage --algo srpo --any-policy",
    ],
)
def test_every_stage_refuses_the_ids_of_another_model(
    command: str, place: Path, tmp_path: Path
) -> None:
    ended = []
    for model in ("own", "other"):
        name, *options = command.replace("OUT", str(tmp_path / model)).split()
        ended.append(invoke(name, *options, "-m", place / model, place / "r.jsonl"))
    assert ended[1].exit_code == 65, ended[1].output
    assert "r.jsonl:1: its tokens do not read as its completion" in ended[1].stderr
    assert "do not read" not in ended[0].stderr


def test_records_of_another_model_can_be_kept_or_left_out(place: Path, tmp_path: Path) -> None:
    for on_error, errors in (("keep", [True] * 4), ("skip", [])):
        out = tmp_path / f"{on_error}.jsonl"
        line = ["-m", place / "other", "--on-error", on_error, "-o", out, place / "r.jsonl"]
        assert invoke("score-elbo", *line).exit_code == 0
        assert ["error" in record for record in read_jsonl(out)] == errors
