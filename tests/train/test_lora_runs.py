"""Runs that begin from LoRA runs, plain weights of them, and what resuming refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import invoke, tiny_policy
from small_runs import BATCHING, OBJECTIVE, same, train, verified, weights
from transformers import AutoModelForCausalLM

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.models.saving import save_policy
from dlmctl.models.token_text import tokenizer_of_model
from dlmctl.models.tokenizers import PUZZLE_ALPHABET
from dlmctl.records.errors import DataError, UsageError
from dlmctl.rl.samplers import reference_log_probs
from dlmctl.rl.update import update_policy
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.lora import has_adapter
from dlmctl.train.run import open_run


def scores(policy):
    examples = [example_of(record, policy, MaskPlan(samples=2)) for record in verified(2)]
    with torch.no_grad():
        return log_probs(policy, examples, 8)


def scores_of(directory: Path):
    return scores(load_policy(str(directory), "cpu"))


@pytest.fixture
def lora(tmp_path, saved_models) -> Path:
    """A LoRA run that has moved far from its base."""
    train(tmp_path / "lora", saved_models("llada"), verified(3), 4, rate=0.1)
    base = scores(load_policy(saved_models("llada"), "cpu"))
    assert float((scores_of(tmp_path / "lora") - base).abs().max()) > 0.1
    return tmp_path / "lora"


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_begins_from_a_lora_run(tmp_path, lora, rank):
    metrics, run = train(tmp_path / "next", str(lora), verified(2), rank, rate=1e-2)
    # It begins where the other one ended, and that is its reference.
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert abs(metrics[1]["kl"]) > 1e-4
    assert run.progress.reference == str((lora / "latest").resolve())
    assert has_adapter(run.policy) == bool(rank)
    examples = [example_of(record, run.policy, MaskPlan(samples=2)) for record in verified(2)]
    reference = reference_log_probs(run, examples, 8)
    assert torch.allclose(reference, scores_of(lora), atol=1e-5)
    # What is on disk scores as what was trained.
    assert torch.allclose(scores_of(tmp_path / "next"), scores(run.policy), atol=1e-5)
    again = load_policy(str(tmp_path / "next"), "cpu")
    assert again.revision == run.policy.revision


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_from_a_lora_run_in_two_parts_ends_as_one_in_one_part(tmp_path, lora, rank):
    train(tmp_path / "whole", str(lora), verified(4), rank)
    train(tmp_path / "parts", str(lora), verified(2), rank)
    train(tmp_path / "parts", str(lora), verified(2, first=2), rank)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_newer_adapters_on_an_adapter_are_copied_in(tmp_path, lora):
    train(tmp_path / "next", str(lora), verified(1), 2)
    policy = load_policy(str(tmp_path / "next"), "cpu")
    train(tmp_path / "next", str(lora), verified(1, first=1), 2)
    newer = reload_policy(policy, str(tmp_path / "next"), "cpu", "auto")
    assert newer.model is policy.model
    assert newer.revision == load_policy(str(tmp_path / "next"), "cpu").revision
    assert torch.equal(scores(newer), scores_of(tmp_path / "next"))


def test_an_adapter_over_an_adapter_does_not_take_its_place(tmp_path, lora):
    train(tmp_path / "next", str(lora), verified(1), 4)  # of the same shape
    newer = reload_policy(load_policy(str(lora), "cpu"), str(tmp_path / "next"), "cpu", "auto")
    assert newer.revision == load_policy(str(tmp_path / "next"), "cpu").revision
    assert torch.equal(scores(newer), scores_of(tmp_path / "next"))


def test_the_tokenizer_below_two_adapters_is_found(tmp_path, lora):
    train(tmp_path / "next", str(lora), verified(1), 2)
    assert tokenizer_of_model(str(tmp_path / "next")).mask_token_id == 2


@pytest.mark.parametrize("times", [1, 2])
def test_merged_weights_are_a_plain_model_that_scores_alike(tmp_path, lora, times):
    name = lora
    if times == 2:
        name = tmp_path / "next"
        train(name, str(lora), verified(2), 2)
    assert invoke("merge", "-m", name, "-o", tmp_path / "plain").exit_code == 0
    policy = load_policy(str(tmp_path / "plain"), "cpu")
    assert not has_adapter(policy)
    assert (policy.family, policy.mask_id) == ("llada", 2)
    assert torch.allclose(scores(policy), scores_of(name), atol=1e-5)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert same(stock.state_dict(), policy.model.state_dict())


def test_merged_weights_have_the_dtype_of_the_base_unless_another_is_asked_for(tmp_path):
    policy = tiny_policy()
    policy.model.to(torch.bfloat16)
    save_policy(policy, tmp_path / "base")
    for options, expected in (([], torch.bfloat16), (["--dtype", "float16"], torch.float16)):
        place = tmp_path / str(expected)
        assert invoke("merge", "-m", tmp_path / "base", "-o", place, *options).exit_code == 0
        assert AutoModelForCausalLM.from_pretrained(place, dtype="auto").dtype == expected
    again = invoke("merge", "-m", tmp_path / "base", "-o", place)
    assert again.exit_code == 73
    assert "is there and not empty" in again.stderr


def test_merge_writes_down_how_a_model_is_read(tmp_path):
    policy = tiny_policy("ar")
    policy.model.float()
    save_policy(policy, tmp_path / "base")
    options = ["--family", "a2d", "--mask-id", "7", "-o", tmp_path / "plain"]
    assert invoke("merge", "-m", tmp_path / "base", *options).exit_code == 0
    policy = load_policy(str(tmp_path / "plain"), "cpu")
    assert (policy.family, policy.mask_id, policy.shift) == ("a2d", 7, 0)


def resumed(directory, model=None, adapter=None):
    run = open_run(
        directory, model, "rspo", Optimizer(1e-2), adapter or Adapter(), "cpu", "auto", False, 0
    )
    return list(update_policy(verified(1), run, OBJECTIVE, BATCHING, 2, 8, 100, 2))


def test_an_adapter_is_not_asked_of_a_run_that_has_none(tmp_path, saved_models):
    train(tmp_path / "full", saved_models("llada"), verified(1))
    with pytest.raises(UsageError, match="full trains all weights, not an adapter"):
        resumed(tmp_path / "full", adapter=Adapter(4))


@pytest.mark.parametrize("other", [Adapter(8), Adapter(4, 16.0), Adapter(4, dropout=0.1)])
def test_another_adapter_is_not_asked_of_a_run(lora, other):
    with pytest.raises(UsageError, match="trains an adapter of rank 4, alpha 64 and dropout 0"):
        resumed(lora, adapter=other)
    assert resumed(lora)
    assert resumed(lora, adapter=Adapter(4))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_run_is_not_resumed_with_another_model(tmp_path, saved_models, rank):
    place, base = tmp_path / "run", saved_models("llada")
    train(place, base, verified(1), rank)
    with pytest.raises(UsageError, match=r"run began with .*, not with .*: leave --model out"):
        resumed(place, saved_models("a2d"))
    with pytest.raises(UsageError, match="not with builtin:puzzles"):
        resumed(place, "builtin:puzzles")
    with pytest.raises(UsageError, match="family=a2d"):
        resumed(place, f"{base},family=a2d")
    for same_model in (base, None, str(place), str(place / "latest")):
        assert resumed(place, same_model)


def test_a_later_checkpoint_of_the_run_that_it_began_with_is_no_other_model(tmp_path, saved_models):
    train(tmp_path / "first", saved_models("llada"), verified(1))
    train(tmp_path / "second", str(tmp_path / "first"), verified(1))
    train(tmp_path / "first", None, verified(1, first=1))
    assert resumed(tmp_path / "second", str(tmp_path / "first"))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_base_with_other_weights_is_no_base_of_a_run(tmp_path, rank):
    base, place = tmp_path / "base", tmp_path / "run"
    for seed in (1, 2):
        shutil.rmtree(base, ignore_errors=True)
        policy = tiny_policy(alphabet=PUZZLE_ALPHABET, seed=seed)
        policy.model.float()
        save_policy(policy, base)
        if seed == 1:
            train(place, str(base), verified(1), rank)
    with pytest.raises(DataError, match="has other weights"):
        resumed(place)
    if rank:  # nor is what was trained on it sampled from
        with pytest.raises(DataError, match=r"base, the model .* has other weights now"):
            load_policy(str(place), "cpu")
