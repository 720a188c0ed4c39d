"""Rows with `chosen` and `rejected`, as `update --algo vrpo` trains on them."""

import json

import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy
from dlmctl.records.errors import DataError
from dlmctl.records.groups import whole_groups
from dlmctl.records.jsonl import Record, located
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching, Reference, policy_gradients
from dlmctl.rl.preferences import preference_pairs

USER = {"role": "user", "content": "12="}
OTHER = {"role": "user", "content": "21="}


def says(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "12=", "chosen": "3", "rejected": "04"},
        {"prompt": [USER], "chosen": [says("3")], "rejected": [says("04")]},
        {"messages": [USER], "chosen": "3", "rejected": "04"},
        {"chosen": [USER, says("3")], "rejected": [USER, says("04")]},
        {"prompt": "12=", "chosen": [USER, says("3")], "rejected": [USER, says("04")]},
    ],
    ids=["texts", "answers", "messages", "conversations", "both"],
)
def test_every_form_of_a_row_is_the_same_pair(row):
    policy = tiny_policy()
    pair = list(preference_pairs([located({**row, "tokens": {"prompt": [9]}}, "f:1")], "fail"))
    assert [one["completion"] for one in pair] == ["3", "04"]
    assert [one["reward"] for one in pair] == [1, 0]
    assert [policy.encode(one) for one in pair] == [policy.encode({"prompt": "12="})] * 2
    assert {one.where for one in pair} == {"f:1"}
    assert [*whole_groups(pair)] == [pair]


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ({"prompt": "1", "chosen": "2"}, "field 'rejected' is missing"),
        ({"prompt": "1", "chosen": 2, "rejected": "3"}, "field 'chosen' is something else"),
        ({"prompt": "1", "chosen": "", "rejected": "3"}, "field 'chosen' is something else"),
        ({"prompt": "1", "chosen": [USER], "rejected": "3"}, "that end with the assistant's"),
        ({"prompt": "1", "chosen": [], "rejected": "3"}, "that end with the assistant's"),
        ({"prompt": "1", "chosen": "2", "rejected": "2"}, "are the same text"),
        ({"chosen": "2", "rejected": "3"}, "the row has no prompt"),
        (
            {"chosen": [USER, says("2")], "rejected": [OTHER, says("3")]},
            "answer different messages",
        ),
    ],
)
def test_a_bad_row_is_refused_or_left_out_whole(row, fault, capsys):
    good = located({"prompt": "12=", "chosen": "3", "rejected": "4"}, "f:1")
    rows = [good, located(row, "f:2"), good]
    with pytest.raises(DataError, match=fault) as caught:
        list(preference_pairs(rows, "fail"))
    assert str(caught.value).startswith("f:2: ")
    left = list(preference_pairs(rows, "skip"))
    assert [one["id"] for one in left] == ["pair-0", "pair-0", "pair-2", "pair-2"]
    assert fault in capsys.readouterr().err


def test_a_step_is_that_of_dpo_on_the_elbo():
    """The gradient of -log sigmoid(beta (d_w - d_l)), by autograd through whole logits."""
    policy, reference = tiny_policy(seed=1), tiny_policy(seed=2)
    rows = [
        Record(prompt="12=", chosen="3", rejected="04"),
        Record(prompt="0", chosen="1=23", rejected="4"),
    ]
    groups = [*whole_groups(preference_pairs(rows, "fail"))]
    plan, beta = MaskPlan("uniform", 4), 0.3
    frozen = Reference("r", lambda examples: log_probs(reference, examples, 8))
    objective = make_objective("vrpo", beta=beta)
    [metrics] = policy_gradients(policy, frozen, groups, objective, Batching(plan), 3)
    ours = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()

    def elbo(model, record):
        example, total = example_of(record, policy, plan), 0.0
        for masked, weight in zip(example.masks.masked, example.masks.weights, strict=True):
            tokens = torch.tensor(example.completion)
            ids = torch.tensor([[*example.prompt, *tokens.where(~masked, policy.mask_id)]])
            logits = model(input_ids=ids).logits[0, len(example.prompt) :].log_softmax(-1)
            total = total + weight * logits[torch.arange(len(tokens)), tokens][masked].sum()
        return total / len(example.masks.weights)

    losses = []
    for chosen, rejected in groups:
        with torch.no_grad():
            before = elbo(reference.model, chosen) - elbo(reference.model, rejected)
        margin = elbo(policy.model, chosen) - elbo(policy.model, rejected) - before
        losses.append(torch.log1p(torch.exp(-beta * margin)))
    expected = torch.stack(losses).mean()
    expected.backward()
    assert metrics["loss"] == pytest.approx(float(expected.detach()), rel=1e-9)
    assert metrics["pairs"] == 2
    for parameter, gradient in zip(policy.model.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-11)


def trained(place, model, rows, *options):
    source = place / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return invoke("update", source, "-m", model, "--device", "cpu", "--lr", "1e-3", *options)


ROWS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"{n}0"} for n in range(6)]


def test_the_command_trains_and_resumes_in_its_input(tmp_path, saved_models):
    model, pair = saved_models("llada"), ("--algo", "vrpo", "--prompts-per-step", 2, "-k", 2)
    whole = trained(tmp_path, model, ROWS, *pair, "-o", tmp_path / "whole")
    assert whole.exit_code == 0, whole.output
    steps = read_jsonl(tmp_path / "whole/metrics.jsonl")
    assert [(s["prompts"], s["completions"], s["pairs"]) for s in steps] == [(2, 4, 2)] * 3
    assert not {"reward", "accuracy"} & {*steps[0]}
    assert steps[0]["kl"] == 0
    assert steps[-1]["kl"] != 0
    first = trained(tmp_path, model, ROWS[:2], *pair, "-o", tmp_path / "parts")
    assert first.exit_code == 0, first.output
    rest = trained(tmp_path, model, ROWS, *pair, "-o", tmp_path / "parts", "--resume")
    assert rest.exit_code == 0, rest.output
    one, other = (
        load_policy(str(tmp_path / run), "cpu").model.state_dict() for run in ("whole", "parts")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_completions_are_filled_up_as_for_sft(tmp_path, saved_models):
    run = tmp_path / "run"
    pair = ("--algo", "vrpo", "-k", 2, "--fill-to", 5, "-o", run)
    done = trained(tmp_path, saved_models("llada"), ROWS, *pair)
    assert done.exit_code == 0, done.output
    short = trained(tmp_path, saved_models("llada"), ROWS, "--algo", "vrpo", "--fill-to", 1)
    assert "the completion has 2 tokens, --fill-to is 1" in short.output


def test_rows_are_for_vrpo_and_refusals_name_the_line(tmp_path, saved_models):
    model, run = saved_models("llada"), tmp_path / "run"
    for algo in ("rspo", "sft"):
        refused = trained(tmp_path, model, ROWS, "--algo", algo, "-o", run)
        assert refused.exit_code == 2
        assert "rows.jsonl:1: a row with 'chosen' and 'rejected'" in refused.output
    rows = [ROWS[0], {"prompt": "1", "chosen": "2"}]
    bad = trained(tmp_path, model, rows, "--algo", "vrpo", "-o", run)
    assert bad.exit_code == 65
    assert "rows.jsonl:2: field 'rejected' is missing" in bad.output
    plain = [{"prompt": "1", "completion": "2", "reward": 1, "id": "a"}]
    filled = trained(tmp_path, model, plain, "--algo", "vrpo", "--fill-to", 8, "-o", run)
    assert filled.exit_code == 2
    assert "--fill-to is for texts" in filled.output
