"""Averages of weights: what checkpoints have, and what a run resumes from."""

import pytest
import torch
from conftest import invoke
from safetensors.torch import load_file
from small_runs import verified

from dlmctl.models.loading import load_policy
from dlmctl.records.jsonl import dump
from dlmctl.train.averages import decay_at, move_average
from dlmctl.train.run_directory import TENSORS

LINE = "--algo sft -k 2 --prompts-per-step 2 --lr 1e-2 --save-every 1 --keep 9 -q --device cpu"


@pytest.mark.parametrize("decay", [0.9, 0.4, 1.0])
def test_the_average_is_to_the_bit_the_one_of_each_tensor(decay):
    random = torch.Generator().manual_seed(0)
    old, new = ([torch.randn(n, generator=random) for n in (3, 5)] for _ in range(2))
    moved = [value.clone() for value in old]
    move_average(moved, new, decay)
    for mean, before, now in zip(moved, old, new, strict=True):
        torch.testing.assert_close(mean, decay * before + (1 - decay) * now)
        assert torch.equal(mean, torch.lerp(before, now, 1 - decay))


def run(directory, model, file, *options, code=0):
    done = invoke("update", *LINE.split(), "-m", model, "-o", directory, *options, file)
    assert done.exit_code == code, done.stderr
    return done.stderr


def checkpoint(directory, step):
    return load_policy(str(directory / f"step-{step:06d}"), "cpu").model.state_dict()


@pytest.fixture
def given(tmp_path):
    file = tmp_path / "given.jsonl"
    file.write_bytes(b"".join(map(dump, verified(4))))
    return file


@pytest.mark.parametrize("adapter", [[], ["--lora-rank", "4"]])
def test_checkpoints_have_the_average_of_the_weights(tmp_path, saved_models, given, adapter):
    model = saved_models("llada")
    run(tmp_path / "plain", model, given, *adapter)
    run(tmp_path / "mean", model, given, *adapter, "--ema", "0.5")
    steps = range(1, 5)
    kept = [load_file(tmp_path / "mean" / f"step-{n:06d}" / TENSORS) for n in steps]
    names = [name.removeprefix("weights.") for name in kept[0] if name.startswith("weights.")]
    assert len(names) > 5
    plain, mean = ([checkpoint(tmp_path / of, n) for n in steps] for of in ("plain", "mean"))
    first = load_policy(model, "cpu").model.state_dict()
    for name in names:
        begun = first.get(name)
        if begun is None:  # of a new adapter: B is 0, and A is the same random matrix in both runs
            if "lora_B" not in name:
                continue
            begun = torch.zeros_like(plain[0][name])
        expected = begun.clone()
        for step, raw, saved, tensors in zip(steps, plain, mean, kept, strict=True):
            torch.testing.assert_close(tensors[f"weights.{name}"], raw[name])
            expected = torch.lerp(expected, raw[name], 1 - decay_at(step, 0.5))
            torch.testing.assert_close(saved[name], expected)
    assert decay_at(1, 0.5) == 2 / 11
    assert decay_at(100, 0.5) == 0.5


@pytest.mark.parametrize("adapter", [[], ["--lora-rank", "4"]])
def test_a_run_that_was_cut_goes_on_to_the_same_weights(tmp_path, saved_models, given, adapter):
    model, options = saved_models("llada"), [*adapter, "--ema", "0.9"]
    run(tmp_path / "one", model, given, *options)
    lines = given.read_bytes().splitlines(keepends=True)
    for part, rows in (("begin", lines[:8]), ("rest", lines[8:])):
        (tmp_path / part).write_bytes(b"".join(rows))
        run(tmp_path / "two", model, tmp_path / part, *options)
    one, two = (load_file(tmp_path / of / "latest" / TENSORS) for of in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    weights, again = checkpoint(tmp_path / "one", 4), checkpoint(tmp_path / "two", 4)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_an_average_is_not_left_behind_nor_sampled_from(tmp_path, saved_models, given):
    model = saved_models("llada")
    run(tmp_path / "run", model, given, "--ema", "0.9")
    assert "averages its weights: give --ema" in run(tmp_path / "run", model, given, code=2)
    line = ["--algo", "rspo", "--ema", "0.9"]
    assert "--ema is for --algo sft" in run(tmp_path / "new", model, given, *line, code=2)
    assert not (tmp_path / "new").exists()
