"""A backward pass that does not fit into memory is done again with activations recomputed."""

import pytest
import torch
from conftest import tiny_policy

from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.records.jsonl import Record
from dlmctl.rl.gradient import accumulate_gradient
from dlmctl.train.activations import checkpoint_activations, checkpoints_activations


def batch(policy):
    records = [
        Record(id="a", sample=n, tokens={"prompt": [3, 4], "completion": [5, 3 + n, 6, 7]})
        for n in range(3)
    ]
    examples = [example_of(record, policy, MaskPlan(samples=4)) for record in records]
    return examples, torch.linspace(-1, 1, 3 * 4 * 4, dtype=torch.float64).view(3, 4, 4)


def run_out_of_memory(policy, always=False):
    """In the backward pass of the first layer, when those of all others have left their part."""

    def check(gradient):
        if always or not checkpoints_activations(policy.core):
            raise torch.OutOfMemoryError("simulated")

    def watch(module, inputs, output):
        if output.requires_grad:
            output.register_hook(check)

    policy.core.model.layers[0].register_forward_hook(watch)


def gradient(policy):
    return torch.cat([p.grad.flatten() for p in policy.model.parameters()])


def test_the_gradient_is_that_of_enough_memory(capsys):
    policy, short = tiny_policy(), tiny_policy()
    value = accumulate_gradient(policy, *batch(policy), 5)
    run_out_of_memory(short)
    assert accumulate_gradient(short, *batch(short), 5) == pytest.approx(value)
    torch.testing.assert_close(gradient(short), gradient(policy))
    assert capsys.readouterr().err.count("activations are recomputed from now on") == 1
    accumulate_gradient(short, *batch(short), 5)
    assert not capsys.readouterr().err


def test_what_does_not_fit_even_so_is_an_error():
    policy = tiny_policy()
    run_out_of_memory(policy, always=True)
    with pytest.raises(torch.OutOfMemoryError):
        accumulate_gradient(policy, *batch(policy), 5)
    assert checkpoints_activations(policy.core)


def test_a_gradient_that_others_began_is_not_thrown_away():
    policy = tiny_policy()
    accumulate_gradient(policy, *batch(policy), 5)
    before = gradient(policy)
    run_out_of_memory(policy)
    with pytest.raises(torch.OutOfMemoryError):
        accumulate_gradient(policy, *batch(policy), 5)
    assert not checkpoints_activations(policy.core)
    assert gradient(policy).shape == before.shape


def test_checkpointing_is_seen():
    policy = tiny_policy()
    assert not checkpoints_activations(policy.core)
    checkpoint_activations(policy.core)
    assert checkpoints_activations(policy.core)
