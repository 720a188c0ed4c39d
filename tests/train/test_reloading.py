"""Newer weights of a run, put into the model that is in memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import train, verified

from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.records.errors import DataError
from dlmctl.train.run_directory import latest_checkpoint


@pytest.mark.parametrize("rank", [0, 4])
def test_newer_weights_are_copied_into_the_tensors_that_are_there(tmp_path, saved_models, rank):
    model = saved_models("llada")
    train(tmp_path / "run", model, verified(1), rank=rank)
    policy = load_policy(str(tmp_path / "run"), "cpu")
    places = {name: p.data_ptr() for name, p in policy.model.named_parameters()}
    old = latest_checkpoint(tmp_path / "run")
    train(tmp_path / "run", model, verified(2), rank=rank)
    assert latest_checkpoint(tmp_path / "run") != old
    policy = reload_policy(policy, str(tmp_path / "run"), "cpu", "auto")
    fresh = load_policy(str(tmp_path / "run"), "cpu")
    assert policy.revision == fresh.revision
    ours, theirs = policy.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {name: p.data_ptr() for name, p in policy.model.named_parameters()} == places


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_first_adapter_is_put_on_the_base_in_memory(tmp_path, saved_models, dtype):
    """So that there is one model, not two."""
    model = saved_models("llada")
    base = load_policy(model, "cpu", dtype)
    places = {p.data_ptr() for p in base.model.parameters()}
    train(tmp_path / "run", model, verified(1), rank=4)
    policy = reload_policy(base, str(tmp_path / "run"), "cpu", dtype)
    fresh = load_policy(str(tmp_path / "run"), "cpu", dtype)
    assert policy.revision == fresh.revision
    assert policy.revision.startswith(base.revision + ".")
    assert policy.name == fresh.name
    ours, theirs = policy.model.state_dict(), fresh.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name])
    assert places < {p.data_ptr() for p in policy.model.parameters()}
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(policy.model(ids).logits, fresh.model(ids).logits)
    # And the next one is copied in.
    train(tmp_path / "run", model, verified(1, first=1), rank=4)
    newer = reload_policy(policy, str(tmp_path / "run"), "cpu", dtype)
    assert newer.model is policy.model
    again = load_policy(str(tmp_path / "run"), "cpu", dtype)
    assert torch.equal(newer.model(ids).logits, again.model(ids).logits)


def test_a_model_that_is_not_the_base_of_an_adapter_is_left_as_it_is(tmp_path, saved_models):
    """Of other weights, or the same weights read in another way."""
    model = saved_models("llada")
    train(tmp_path / "full", model, verified(1))
    train(tmp_path / "run", model, verified(1), rank=4)
    for name in (str(tmp_path / "full"), f"{model},mask_id=2"):
        other = load_policy(name, "cpu")
        policy = reload_policy(other, str(tmp_path / "run"), "cpu", "auto")
        fresh = load_policy(str(tmp_path / "run"), "cpu")
        assert policy.revision == fresh.revision
        assert policy.mask_id == fresh.mask_id
        assert not hasattr(other.model, "peft_config")


def test_an_adapter_that_does_not_fit_leaves_its_base_as_it_was(tmp_path, saved_models):
    model = saved_models("llada")
    train(tmp_path / "run", model, verified(1), rank=4)
    file = latest_checkpoint(tmp_path / "run") / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, file)
    base = load_policy(model, "cpu")
    ids = torch.tensor([[5, 6, 7]])
    expected, names = base.model(ids).logits, list(base.model.state_dict())
    with pytest.raises(DataError, match="1 of its weights are missing"):
        reload_policy(base, str(tmp_path / "run"), "cpu", "auto")
    assert list(base.model.state_dict()) == names
    assert torch.equal(base.model(ids).logits, expected)
    assert all(p.requires_grad for p in base.model.parameters())
