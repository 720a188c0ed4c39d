"""LoRA runs over quantized weights: what they resume, save and refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import invoke, read_jsonl, tiny_policy
from safetensors.torch import load_file
from small_runs import BATCHING, OBJECTIVE, same, verified

from dlmctl.diffusion.elbo import log_probs
from dlmctl.diffusion.follow import follow_run
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.models.quantization import quantization_of
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.update import update_policy
from dlmctl.settings.compute import QuantizedCompute
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.rollout import Loop
from dlmctl.settings.sampler import Sampler
from dlmctl.train.run import open_run
from dlmctl.train.run_directory import TENSORS
from dlmctl.train.sharding import check_trainable

BASE = "builtin:puzzles"


@pytest.fixture
def package():
    return pytest.importorskip("bitsandbytes", reason="pip install 'dlmctl[quantized]'")


def train(directory, records, quantize="nf4", rank=4, model=BASE, method="adamw", dropout=0.1):
    run = open_run(
        directory,
        model,
        "rspo",
        Optimizer(1e-2, max_norm=1.0, optimizer=method),
        Adapter(rank, dropout=dropout if rank else 0.0),
        "cpu",
        "auto",
        False,
        0,
        quantize=quantize,
    )
    return list(update_policy(records, run, OBJECTIVE, BATCHING, 2, 8, save_every=100, keep=2)), run


def tensors(directory):
    """What a checkpoint has: the adapter and the optimizer's moments."""
    latest = directory / "latest"
    return load_file(latest / "adapter_model.safetensors") | load_file(latest / TENSORS)


def scores(policy):
    examples = [example_of(record, policy, MaskPlan(samples=2)) for record in verified(2)]
    with torch.no_grad():
        return log_probs(policy, examples, 8)


@pytest.mark.parametrize("method", ["adamw", "adamw-8bit"])
def test_a_run_in_two_parts_ends_where_one_in_one_part_does(package, tmp_path, method):
    train(tmp_path / "whole", verified(4), rank=64, method=method)
    train(tmp_path / "parts", verified(2), rank=64, method=method)
    # Without --quantize it is resumed as it was begun.
    train(tmp_path / "parts", verified(2, first=2), None, rank=64, method=method)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert same(whole, parts)
    in_8_bits = [t for name, t in whole.items() if "state1" in name and t.dtype == torch.uint8]
    assert len(in_8_bits) == (0 if method == "adamw" else 56)


def test_a_checkpoint_is_an_adapter_of_the_weights_that_were_quantized(package, tmp_path, capfd):
    _, run = train(tmp_path / "small", verified(2), dropout=0.0)
    train(tmp_path / "plain", verified(2), None, dropout=0.0)
    small, plain = (tmp_path / name / "latest" for name in ("small", "plain"))
    kept = load_file(small / "adapter_model.safetensors")
    other = load_file(plain / "adapter_model.safetensors")
    assert {n: t.shape for n, t in kept.items()} == {n: t.shape for n, t in other.items()}
    assert not same(kept, other)
    configs = [json.loads((d / "adapter_config.json").read_text()) for d in (small, plain)]
    assert configs[0] == configs[1]

    # peft alone loads it over the model as transformers has it.
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = load_policy(BASE, "cpu")
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(small_base(tmp_path)), small
    )
    over_plain = load_policy(str(small), "cpu")
    assert "was trained over weights quantized to nf4" in capfd.readouterr().err
    found = stock.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    expected = over_plain.model.base_model.model.model.layers[0].self_attn.q_proj
    assert torch.equal(found, expected.lora_B["default"].weight)
    assert over_plain.revision == f"{base.revision}.{run.policy.revision.rpartition('.')[2]}"

    # As it was trained, it scores as it did.
    again = load_policy(str(small), "cpu", quantize="nf4")
    assert again.revision == run.policy.revision
    assert again.revision.startswith(f"{base.revision}-nf4.")
    run.policy.model.eval()
    assert torch.equal(scores(again), scores(run.policy))
    assert float((scores(again) - scores(over_plain)).abs().max()) > 1e-3
    assert "nf4" not in capfd.readouterr().err


def small_base(place):
    """The built-in model in a directory that transformers reads."""
    directory = place / "base"
    assert invoke("merge", "-m", BASE, "-o", directory).exit_code == 0
    return directory


def test_the_checkpoint_and_its_card_say_what_it_was_trained_over(package, tmp_path):
    _, run = train(tmp_path / "run", verified(1))
    latest = tmp_path / "run" / "latest"
    counters = json.loads((latest / "dlmctl.json").read_text())
    assert counters["reference_revision"] == f"{load_policy(BASE, 'cpu').revision}-nf4"
    assert "quantized to nf4" in (latest / "README.md").read_text()
    assert run.policy.quantized == "nf4"


def test_merging_says_that_it_merges_into_other_weights(package, tmp_path):
    train(tmp_path / "run", verified(2))
    done = invoke("merge", "-m", tmp_path / "run", "-o", tmp_path / "plain")
    assert done.exit_code == 0, done.output
    assert "was trained over weights quantized to nf4, and is used over those" in done.stderr
    merged, adapted = (
        load_policy(str(tmp_path / "plain"), "cpu"),
        load_policy(str(tmp_path / "run"), "cpu"),
    )
    assert torch.allclose(scores(merged), scores(adapted), atol=1e-4)


def test_newer_adapters_are_copied_in_and_the_weights_below_stay(package, tmp_path):
    train(tmp_path / "run", verified(1))
    policy = load_policy(str(tmp_path / "run"), "cpu", quantize="nf4")
    _, run = train(tmp_path / "run", verified(1, first=1))
    newer = reload_policy(policy, str(tmp_path / "run"), "cpu", "auto")
    assert newer.model is policy.model
    assert newer.revision == run.policy.revision
    run.policy.model.eval()
    assert torch.equal(scores(newer), scores(run.policy))


def test_a_run_over_an_adapter_quantizes_the_merged_weights(package, tmp_path):
    train(tmp_path / "first", verified(2), None)
    merged = load_policy(str(tmp_path / "first"), "cpu")
    _, run = train(tmp_path / "next", verified(1), model=str(tmp_path / "first"))
    assert run.progress.reference_revision == f"{merged.revision}-nf4"
    again = load_policy(str(tmp_path / "next"), "cpu", quantize="nf4")
    assert again.revision == run.policy.revision


def test_what_does_not_go_together_is_refused(package, tmp_path):
    with pytest.raises(UsageError, match="freezes the weights: give --lora-rank"):
        train(tmp_path / "full", verified(1), rank=0)
    train(tmp_path / "plain", verified(1), None)
    with pytest.raises(UsageError, match="not quantized"):
        train(tmp_path / "plain", verified(1))
    train(tmp_path / "eight", verified(1), None, rank=64, method="adamw-8bit")
    with pytest.raises(UsageError, match="moments of --optimizer adamw-8bit"):
        train(tmp_path / "eight", verified(1), None, rank=64)
    with pytest.raises(UsageError, match="moments of --optimizer adamw"):
        train(tmp_path / "plain", verified(1), None, method="adamw-8bit")


def test_several_processes_are_refused():
    policy = tiny_policy()
    check_trainable(policy, "adamw")
    with pytest.raises(UsageError, match="not spread over processes"):
        check_trainable(replace(policy, quantized="nf4"), "adamw")
    with pytest.raises(UsageError, match="not spread over processes"):
        check_trainable(policy, "adamw-8bit")


@pytest.mark.parametrize("sampled_from", ["nf4", None])
def test_ratios_are_to_the_weights_that_sampled_quantized_or_not(package, tmp_path, sampled_from):
    """With the first step's ratios all 1, ESPO's loss is the mean of advantages, which is 0."""
    sampled, judged = tmp_path / "sampled.jsonl", tmp_path / "judged.jsonl"
    shared = ["-q", "--device", "cpu"]
    line = [*shared, "--task", "sudoku", "--prompts", 2, "-n", 2, "--gen-length", 8, "--steps", 2]
    line += ["--quantize", sampled_from] if sampled_from else []
    done = invoke("rollout", *line, "-o", sampled)
    assert done.exit_code == 0, done.output
    records = [{**record, "reward": float(record["sample"])} for record in read_jsonl(sampled)]
    assert quantization_of(records[0]["rollout"]["revision"]) == sampled_from
    judged.write_text("".join(json.dumps(record) + "\n" for record in records))
    training = ["--algo", "espo", "--lora-rank", 4, "--quantize", "nf4", "--inner", 1]
    training += ["--prompts-per-step", 2, "-o", tmp_path / "run"]
    done = invoke("update", *shared, *training, judged)
    assert done.exit_code == 0, done.output
    [metrics] = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    if sampled_from:
        assert metrics["loss"] == pytest.approx(0, abs=1e-6)
    else:
        assert abs(metrics["loss"]) > 1e-3


def test_scores_of_the_whole_weights_are_not_taken_for_those_of_quantized_ones(package, tmp_path):
    records, scored = tmp_path / "records.jsonl", tmp_path / "scored.jsonl"
    records.write_text("".join(json.dumps(record) + "\n" for record in verified(1)))
    values = {}
    for options in ((), ("--quantize", "nf4")):
        line = ["-q", "--device", "cpu", *options, records, "-o", scored]
        scored.unlink(missing_ok=True)
        assert invoke("score-elbo", *line).exit_code == 0
        entry = read_jsonl(scored)[0]["elbo"]["policy"]
        values[entry["revision"]] = entry["value"]
    (plain, whole), (name, quantized) = values.items()
    assert name == f"{plain}-nf4"
    assert abs(whole - quantized) > 1e-3


def test_the_sampler_of_a_loop_takes_quantized_weights(package, tmp_path):
    """Round 0 is sampled from the base, round 1 from the adapter that was trained over it."""
    run = tmp_path / "run"
    train(run, verified(1))
    loop = Loop(follow=run, rounds=1)
    prompts = iter([Record(id="a", prompt="1+1"), Record(id="b", prompt="1+2")])
    compute = QuantizedCompute("cpu", quantize="nf4", batch_size=4)
    sampler = Sampler(gen_length=4, steps=2)
    [first, *_] = follow_run(prompts, loop, BASE, sampler, 1, 2, 0, compute, "fail")
    expected = load_policy(str(run), "cpu", quantize="nf4").revision
    assert first["rollout"]["revision"] == expected
