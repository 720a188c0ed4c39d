"""Supervised fine-tuning of a model that goes left to right: plain cross-entropy."""

import pytest
import torch
from conftest import tiny_policy
from torch.nn import functional

from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.rl.supervised import supervised_gradient, with_completion_ids

TEXTS = [("12=", "3"), ("0", "1234"), ("=2", "04=31")]


def records(policy, fill_to=None):
    made = [Record(id=n, prompt=p, completion=c) for n, (p, c) in enumerate(TEXTS)]
    return [with_completion_ids(record, policy, fill_to) for record in made]


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
    ("fill_to", "until_eos"), [(None, False), (6, False), (6, True)], ids=["as is", "all", "end"]
)
def test_loss_and_gradient_are_those_of_cross_entropy(fill_to, until_eos):
    policy = tiny_policy("ar")
    rows = records(policy, fill_to)
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


def test_an_autoregressive_model_needs_a_token_to_begin_from():
    policy = tiny_policy("ar")
    row = Record(id=1, prompt="", completion="12")
    row.where = "f.jsonl:1"
    with pytest.raises(DataError, match=r"f\.jsonl:1: the prompt is empty"):
        supervised_gradient(policy, [row], MaskPlan(), 0, 1)


def test_a_word_that_has_no_token_is_named():
    with pytest.raises(DataError, match="no tokens for 'x'"):
        with_completion_ids(Record(prompt="1", completion="x"), tiny_policy(), None)
