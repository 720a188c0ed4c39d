"""Supervised fine-tuning of a model that goes left to right: plain cross-entropy."""

import pytest
import torch
from conftest import tiny_policy
from torch.nn import functional

from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.supervised import supervised_gradient, with_completion_ids
from dlmctl.settings.masks import Fill

TEXTS = [("12=", "3"), ("0", "1234"), ("=2", "04=31")]


def records(policy, fill=None):
    made = [Record(id=n, prompt=p, completion=c) for n, (p, c) in enumerate(TEXTS)]
    return [with_completion_ids(record, policy, fill) for record in made]


def cross_entropy(policy, rows, until_eos):
    """Mean over the records of the mean over their tokens, each record by itself, in nats."""
    losses = []
    for row in rows:
        prompt, completion = row["tokens"]["prompt"], row["tokens"]["completion"]
        if until_eos and policy.eos_id in completion:
            completion = completion[: completion.index(policy.eos_id) + 1]
        ids = torch.tensor([[*prompt, *completion]])
        logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        losses.append(functional.cross_entropy(logits, torch.tensor(completion)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("fill", "until_eos"),
    [(None, False), (Fill(6), False), (Fill(6), True), (Fill(2, multiple=True), False)],
    ids=["as is", "all", "end", "multiple"],
)
def test_loss_and_gradient_are_those_of_cross_entropy(fill, until_eos):
    policy = tiny_policy("ar")
    rows = records(policy, fill)
    # Laws and numbers of masks mean nothing here.
    plan = MaskPlan("independent", 3, until_eos=until_eos)
    found = supervised_gradient(policy, rows, plan, 0, batch_size=2)["loss"]
    ours = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    expected = cross_entropy(policy, rows, until_eos)
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-9)
    for parameter, gradient in zip(policy.model.parameters(), ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_completions_are_filled_to_a_length_or_to_a_multiple_of_it():
    policy = tiny_policy("llada")

    def ends(text):
        lengths = []
        for row in records(policy, Fill.read(text)):
            ids = row["tokens"]["completion"]
            lengths.append((len(ids), ids.count(policy.eos_id)))
        return lengths

    assert ends("6") == [(6, 5), (6, 2), (6, 1)]
    assert ends("x4") == [(4, 3), (8, 4), (8, 3)]
    with pytest.raises(UsageError, match="has 5 tokens, --fill-to is 4; --fill-to x4 goes on"):
        ends("4")


@pytest.mark.parametrize("text", ["0", "x0", "x", "", "4x", "4x4", "xx4", "-4", "9" * 40])
def test_what_is_no_filling_is_refused(text):
    with pytest.raises(UsageError, match=r"--fill-to .* is neither a number"):
        Fill.read(text)


def test_an_autoregressive_model_needs_a_token_to_begin_from():
    policy = tiny_policy("ar")
    row = Record(id=1, prompt="", completion="12")
    row.where = "f.jsonl:1"
    with pytest.raises(DataError, match=r"f\.jsonl:1: the prompt is empty"):
        supervised_gradient(policy, [row], MaskPlan(), 0, 1)


def test_a_word_that_has_no_token_is_named():
    with pytest.raises(DataError, match="no tokens for 'x'"):
        with_completion_ids(Record(prompt="1", completion="x"), tiny_policy(), None)
