"""A new block diffusion model through every stage: sampled, judged, scored, trained and read."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from conftest import invoke, read_jsonl

from dlmctl.models.attention import Blocks
from dlmctl.models.loading import load_policy

LENGTH, BLOCK, SAMPLES = 10, 4, 3
SAMPLER = ("--gen-length", LENGTH, "--temperature", 1, "-n", SAMPLES)


def run(*arguments):
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Directory with a model and its completions, rewarded and scored."""
    place = tmp_path_factory.mktemp("blocks")
    sizes = ("--hidden-size", 16, "--heads", 2, "--block-length", BLOCK)
    run("init", place / "model", "--family", "sdar", *sizes)
    run("prompts", "countdown", "-n", 4, "-o", place / "prompts.jsonl")
    model = ("-m", place / "model")
    run("rollout", place / "prompts.jsonl", *model, *SAMPLER, "-o", place / "samples.jsonl")
    run("verify", place / "samples.jsonl", "-o", place / "rewarded.jsonl")
    run("score-elbo", place / "rewarded.jsonl", *model, "-k", 4, "-o", place / "scored.jsonl")
    return place


def weights(directory):
    return load_policy(str(directory), "cpu").model.state_dict()


def trained(place: Path, *arguments):
    """The metrics of a run, whose weights have changed and whose model has its blocks."""
    run("update", *arguments, "-m", place / "model", "-o", place / "run")
    policy = load_policy(str(place / "run"), "cpu")
    assert (policy.family, policy.blocks) == ("sdar", Blocks(BLOCK))
    before, after = weights(place / "model"), policy.model.state_dict()
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before if "proj" in name)
    return read_jsonl(place / "run" / "metrics.jsonl")


def test_completions_are_whole_and_judged_and_scored(made):
    policy, records = load_policy(str(made / "model"), "cpu"), read_jsonl(made / "scored.jsonl")
    assert len(records) == 4 * SAMPLES
    for record in records:
        tokens, rollout = record["tokens"]["completion"], record["rollout"]
        assert len(tokens) == LENGTH
        assert policy.mask_id not in tokens
        assert policy.decode(tokens) == record["completion"]
        # Blocks are counted from the text's beginning and the last is sampled whole.
        start = len(record["tokens"]["prompt"])
        whole = -(-(start + LENGTH) // BLOCK) * BLOCK
        assert rollout["nfe"] == whole - start
        assert rollout["revision"] == policy.revision
        assert 0 <= record["reward"] <= 1
        score = record["elbo"]["policy"]
        assert math.isfinite(score["value"])
        assert score["value"] < 0 <= score["stderr"]


def test_scores_and_samples_do_not_depend_on_the_batch_or_the_cache(made, tmp_path):
    model = ("-m", made / "model")
    line = ("rollout", made / "prompts.jsonl", *model, *SAMPLER)
    run(*line, "-b", 5, "--cache", "none", "-o", tmp_path / "samples.jsonl")
    wanted = read_jsonl(made / "samples.jsonl")
    for ours, theirs in zip(read_jsonl(tmp_path / "samples.jsonl"), wanted, strict=True):
        assert ours["tokens"] == theirs["tokens"]
    line = ("score-elbo", made / "rewarded.jsonl", *model, "-k", 4, "-b", 1)
    run(*line, "-o", tmp_path / "scored.jsonl")
    wanted = read_jsonl(made / "scored.jsonl")
    for ours, theirs in zip(read_jsonl(tmp_path / "scored.jsonl"), wanted, strict=True):
        pair = (record["elbo"]["policy"]["value"] for record in (ours, theirs))
        assert next(pair) == pytest.approx(next(pair), rel=1e-5)


def test_a_rollout_that_was_cut_goes_on(made, tmp_path):
    target, whole = tmp_path / "samples.jsonl", (made / "samples.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    target.with_name("samples.jsonl.partial").write_bytes(b"".join(lines[:5]) + lines[5][:20])
    line = ("rollout", made / "prompts.jsonl", "-m", made / "model", *SAMPLER)
    run(*line, "-o", target, "--resume")
    assert target.read_bytes() == whole


def test_rspo_takes_a_step(made, tmp_path):
    os.symlink(made / "model", tmp_path / "model")
    records = read_jsonl(made / "scored.jsonl")
    for number, record in enumerate(records):  # a random model solves nothing
        record["reward"] = float(number % SAMPLES == 0)
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, records)))
    options = ("--lr", 1e-2, "-k", 2, "--prompts-per-step", 2)
    metrics = trained(tmp_path, "--algo", "rspo", *options, tmp_path / "scored.jsonl")
    assert [line["prompts"] for line in metrics] == [2, 2]
    assert all(math.isfinite(line["loss"]) for line in metrics)


def test_supervised_training_learns(made, tmp_path):
    os.symlink(made / "model", tmp_path / "model")
    rows = [{"id": n, "prompt": f"{n}+1=", "completion": "1234567"} for n in range(8)]
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(map(json.dumps, rows * 5)))
    options = ("--lr", 1e-2, "--prompts-per-step", 2, "--fill-to", LENGTH)
    losses = [line["loss"] for line in trained(tmp_path, "--algo", "sft", *options, source)]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_an_autoencoder_is_trained_on_its_activations(made, tmp_path):
    size = ("--layers", 1, "-k", 2, "--latents", 32, "--sae-batch-size", 64)
    options = (*size, "--tokens", 512, "--log-every", 1)
    run("sae-train", made / "samples.jsonl", "-m", made / "model", *options, "-o", tmp_path / "sae")
    metrics = read_jsonl(tmp_path / "sae" / "metrics.jsonl")
    assert [line["tokens"] for line in metrics] == [64 * step for step in range(1, 9)]
    assert all(line["fvu"] > 0 and line["l0"] == 2 for line in metrics)


def test_a_cache_that_is_an_approximation_is_refused(made):
    line = ("rollout", made / "prompts.jsonl", "-m", made / "model", *SAMPLER)
    done = invoke(*line, "--cache", "dual")
    assert done.exit_code == 2
    assert "--cache dual is an approximation, and " in done.stderr
    assert "is block-causal: take exact, the default" in done.stderr
