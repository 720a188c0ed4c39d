"""`sae-order` and `rollout --remasking sae` as commands, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from small_world import random_sae
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.diffusion.sampler import sample
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.policy import Family
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.formats.folders import SavedSae, write_sae
from dlmctl.sae.order.study import OrderStudy
from dlmctl.sae.order.tracking import read_tracked_saes
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer
from dlmctl.sae.topk import TopKSae

SETTINGS = SamplerConfig(9, 5, 8, temperature=0.9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dictionary for the small models, said to be of layer 0."""
    directory = tmp_path_factory.mktemp("saes") / "layer0"
    write_sae(SavedSae(random_sae(), {"dlm_layer": 0}), directory)
    return str(directory)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("ar", {}, "sae-order means nothing to"),
        ("llada", {"cache": "prefix"}, "leave out --cache"),
        ("llada", {"compile": True}, "sae-order and --compile"),
        ("llada", {"threshold": 0.9}, "--threshold compares a confidence"),
    ],
)
def test_what_features_cannot_be_followed_in_is_refused(
    family: Family, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        OrderStudy(
            tiny_policy(family),
            [SaeAtLayer("d", 0, random_sae().double())],
            SamplerConfig(**settings),
            ["random", "entropy"],
        )


def test_an_order_by_features_needs_a_callback() -> None:
    with pytest.raises(UsageError, match="give one with --sae"):
        sample(tiny_policy(), [[3, 4]], [1], SamplerConfig(4, 4, 4, remasking="sae"))


def test_autoencoders_are_read_and_refused(folder: str, tmp_path: Path) -> None:
    write_sae(SavedSae(TopKSae(8, 20, 3)), tmp_path / "narrow")
    narrow, policy = str(tmp_path / "narrow"), tiny_policy()
    found = read_tracked_saes([folder, f"{folder}@1"], policy)
    assert [(one.layer, one.sae.W_enc.dtype) for one in found] == [
        (0, torch.float64),
        (1, torch.float64),
    ]
    for texts, message in [
        ([narrow], r"which layer it is of .*--sae .*narrow@LAYER"),
        ([f"{narrow}@0"], "width 8, the model's have 16"),
        ([f"{folder}@2"], "no layer 2"),
        ([folder, f"{folder}@0"], "names an autoencoder twice"),
    ]:
        with pytest.raises(UsageError, match=message):
            read_tracked_saes(texts, policy)


def test_records_that_cannot_be_used() -> None:
    def run(record: Record, on_error: Any) -> list[Record]:
        study = OrderStudy(
            tiny_policy(),
            [SaeAtLayer("d", 0, random_sae().double())],
            SETTINGS,
            ["random", "margin"],
            "answer",
        )
        return list(study.run([record, Record(id="a", prompt="1")], 1, 0, 4, on_error))

    for record, message in [
        (Record(id=1, prompt="12", answer=7), "'answer' is neither text nor"),
        (Record(id=1, prompt="12", answer="xyz"), "has no tokens for"),
        (Record(id=1), "has no 'prompt'"),
        (Record(prompt="12"), "'id' is missing"),
    ]:
        with pytest.raises(DataError, match=message):
            run(record, "fail")
        assert ["error" in made for made in run(record, "keep")] == [True, False, False]


def test_the_commands(folder: str, tmp_path: Path, saved_models: Any) -> None:
    prompts, summary = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    lines = [{"id": name, "prompt": "12=", "solution": "34"} for name in "ab"]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def run(name: str, *options: str, model: str = "llada") -> Any:
        model = saved_models(model)
        line = [name, "-m", model, "-n", "2", "--gen-length", "8", *options, str(prompts)]
        return CliRunner().invoke(app, line)

    done = run("sae-order", "--sae", folder, "--orders", "random,sae", "--truth", "solution",
               "--probe", "--summary", str(summary))  # fmt: skip
    assert done.exit_code == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(r["rollout"]["remasking"], r["id"], r["sample"]) for r in records] == [
        (order, name, sample) for order in ("random", "sae") for name in "ab" for sample in (0, 1)
    ]
    rows = [json.loads(line) for line in summary.read_text().splitlines()]
    mean, last = ["mean", *["turnover"] * 10], [*["solving"] * 6, "probe"]
    kinds = [*mean * 2, *["feature"] * 20, *["signal"] * 14, *last * 2]
    assert [row["row"] for row in rows] == kinds
    assert rows[-1]["reason"] == "a half has 1 puzzles, and a probe takes at least 10"
    assert rows[0]["completions"] == 4
    done = run("rollout", "--remasking", "sae", "--sae", f"{folder}@1")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[0])["rollout"]["sae"][0]["layer"] == 1

    sae = ["--sae", folder]
    for name, options, model, message in [
        ("rollout", ["--remasking", "sae"], "llada", "--remasking sae and --sae SAE go together"),
        ("rollout", sae, "llada", "--remasking sae and --sae SAE go together"),
        ("rollout", ["--remasking", "sae", *sae], "ar", "an autoregressive model"),
        ("rollout", ["--remasking", "sae", *sae, "--cache", "dual"], "llada", "out --cache"),
        ("rollout", ["--remasking", "sae", *sae, "--compile"], "llada", "sae and --compile"),
        ("rollout", ["--remasking", "sae", *sae, "--follow", "r"], "llada", "--sae and --follow"),
        ("sae-order", sae, "ar", "an autoregressive model"),
        ("sae-order", [*sae, "--probe"], "llada", "name the field with --truth"),
        ("sae-order", [*sae, "--orders", "random,best"], "llada", "no order 'best'"),
        ("sae-order", [*sae, "--summary", "-"], "llada", "give --summary a file"),
        ("sae-order", [*sae, "--task", "sudoku"], "llada", "not from both"),
    ]:
        refused = run(name, *options, model=model)
        assert refused.exit_code == 2, (options, refused.stdout)
        assert message in refused.stderr
