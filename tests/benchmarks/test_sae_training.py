"""sae.py: both sides do the same work, with the same result."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import orjson
import pytest
import torch
from conftest import tiny_policy
from dense_sae import DenseTrainer
from sae import (
    Pipeline,
    app,
    compare_pipelines,
    compare_steps,
    planted_activations,
    stored_activations,
)
from safetensors.torch import save_file
from typer.testing import CliRunner

from dlmctl.bench.memory import CLEAR
from dlmctl.records.errors import UsageError
from dlmctl.sae.activations import StoredActivations
from dlmctl.sae.training.trainer import SaeTrainer
from dlmctl.settings.sae import Aux, SaeRecipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("aux", ["straight", "pre", "rectified"])
def test_the_dense_steps_are_those_of_sae_train(aux: Aux) -> None:
    data = [x.double() for x in planted_activations(8, 32, 12, 3, CPU)]
    recipe = SaeRecipe(24, 32, 32 * 12, 3e-3, dead_after=64, aux=aux)
    ours = SaeTrainer(recipe, 8, 2, 0, "cpu")
    ours.sae.double()
    ours.begin(data[0])
    with torch.no_grad():
        ours.sae.bias[12:] = -2.0  # dead, for the auxiliary loss
    dense, first = DenseTrainer(ours), copy.deepcopy(ours.sae)
    for x in data:
        assert dense.train_step(x) == pytest.approx(ours.train_step(x)["l2"], rel=1e-9)
    assert torch.equal(dense.unused, ours.unused)
    assert bool(ours.dead.any())
    begun = dict(first.named_parameters())
    for name, parameter in ours.sae.named_parameters():
        torch.testing.assert_close(parameter, dense.sae.get_parameter(name))
        assert not torch.equal(parameter, begun[name])


def test_steps_have_a_row_for_each_way_and_k() -> None:
    data = planted_activations(8, 32, 5, 3, CPU)
    rows = list(compare_steps(data, 24, [2, 4], 0))
    assert [(row["path"], row["k"], row["steps"]) for row in rows] == [
        ("dense", 2, 3),
        ("sae-train", 2, 3),
        ("dense", 4, 3),
        ("sae-train", 4, 3),
    ]
    for dense, ours in (rows[:2], rows[2:]):
        assert ours["loss"] == pytest.approx(dense["loss"], rel=1e-4)
        speeds = ours["tokens_per_second"], dense["tokens_per_second"]
        assert ours["ratio"] == pytest.approx(speeds[0] / speeds[1])
        assert (ours["peak_memory_mb"] is not None) == CLEAR.exists()


def test_planted_activations_are_those_of_the_seed() -> None:
    data, again = planted_activations(8, 32, 2, 3, CPU), planted_activations(8, 32, 3, 3, CPU)
    assert [x.shape for x in data] == [(32, 8), (32, 8)]
    assert torch.equal(data[1], again[1])
    assert not torch.equal(data[0], data[1])


def test_a_shared_pass_trains_the_autoencoders_of_a_pass_for_each_layer() -> None:
    policy = tiny_policy(layers=3)
    policy.model.float()
    pipeline = Pipeline("", "0,2", "mask,unmask", 2, 64, 4, 12)
    each, shared = compare_pipelines(policy, pipeline, [2, 3], 0)
    assert (each["path"], shared["path"]) == ("per layer", "shared")
    assert each["autoencoders"] == shared["autoencoders"] == 8
    assert each["difference"] == 0
    assert shared["difference"] < 1e-5
    # There are fewer masked tokens, and they decide how many passes all of them take together.
    assert shared["passes"] < each["passes"] / 2 < 2 * shared["passes"]
    for row in (each, shared):
        assert row["seconds"] == pytest.approx(row["model_seconds"] + row["sae_seconds"])
        assert row["ratio"] == pytest.approx(each["seconds"] / row["seconds"])


def test_stored_activations_come_in_batches_in_their_order(tmp_path: Path) -> None:
    index = {"layers": [3, 4], "positions": ["mask"], "blocks": 2, "width": 2}
    (tmp_path / "activations.json").write_text(json.dumps(index))
    rows = torch.arange(22.0).reshape(11, 2)
    for number, block in enumerate((rows[:4], rows[4:])):
        save_file({"3.mask": block}, tmp_path / f"block-{number:06d}.safetensors")
    data = stored_activations(StoredActivations(tmp_path), 3, 6, CPU)
    assert [x.shape for x in data] == [(3, 2)] * 6
    assert torch.equal(torch.cat(data), torch.cat([rows, rows])[:18])


def test_the_command_writes_both_measurements() -> None:
    small = "--width 8 --latents 16 --sae-batch-size 16 --steps 1"
    pipe = "-m random:tiny --layers 0,1 --tokens 32 --context 16 -b 4"
    done = CliRunner().invoke(app, f"-k 2 {small} {pipe}".split())
    assert done.exit_code == 0, done.stderr
    rows = [orjson.loads(text) for text in done.stdout.splitlines()]
    assert [(row["measure"], row["path"]) for row in rows] == [
        ("steps", "dense"),
        ("steps", "sae-train"),
        ("pipeline", "per layer"),
        ("pipeline", "shared"),
    ]


@pytest.mark.parametrize(
    ("layers", "ks", "message"), [("0,7", [2], "no layer 7"), ("0", [33], "see --expansion")]
)
def test_a_pipeline_that_cannot_be_is_refused(layers: str, ks: list[int], message: str) -> None:
    pipeline = Pipeline("", layers, "mask", 2, 64, 4, 12)
    with pytest.raises(UsageError, match=message):
        list(compare_pipelines(tiny_policy(), pipeline, ks, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--measure steps,speed", "--measure has no 'speed'"),
        ("-k 20 --latents 16", "-k 20 is more than the 16 --latents"),
    ],
)
def test_wrong_options_are_named(options: str, message: str) -> None:
    done = CliRunner().invoke(app, options.split())
    assert done.exit_code == 2
    assert message in done.stderr
