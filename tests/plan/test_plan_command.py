"""The command `plan`: what it reads, what it prints and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import orjson
import pytest
from conftest import invoke, tiny_vision_policy

from dlmctl.models.saving import save_policy

HERE = Path(__file__)
BIG = HERE.parents[2] / "examples" / "large"


def planned(*options):
    done = invoke("plan", "--gen-length", 12, "--batch-size", 2, "-n", 2, *options)
    assert done.exit_code == 0, done.output
    rows = [orjson.loads(line) for line in done.stdout.splitlines()]
    return {row["stage"]: row for row in rows}


@pytest.mark.parametrize("family", ["llada", "mlm", "ar"])
def test_the_config_of_a_model_is_enough(tmp_path, saved_models, family):
    config = Path(saved_models(family)) / "config.json"
    alone = tmp_path / "config.json"
    alone.write_bytes(config.read_bytes())
    rows = planned("-m", alone, "--algo", "grpo" if family == "ar" else "rspo", "--tflops", 1)
    assert rows == planned(
        "-m", tmp_path, "--algo", "grpo" if family == "ar" else "rspo", "--tflops", 1
    ) | {"step": rows["step"]}
    assert [*rows] == ["rollout", "update", "step"]
    assert rows["step"]["total"] == rows["rollout"]["total"] + rows["update"]["total"]
    assert rows["step"]["tokens"] == 32 * 2 * 12
    assert rows["step"]["seconds"] == pytest.approx(rows["step"]["flops"] / 1e12)
    assert "fits" not in rows["step"]


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        (("--algo", "justgrpo"), 12),
        (("--algo", "tracerl", "--block-length", 4, "--steps", 9, "--shrink", 2), 5),
        (("--algo", "tracerl", "--block-length", 4, "--shrink", 1), 12),
        (("--algo", "rspo", "--masks", "left-to-right"), 12),
        (("--algo", "coupled-grpo"), 3),
    ],
)
def test_masks_in_an_order_are_as_many_as_its_steps(saved_models, options, masks):
    model = ("-m", saved_models("llada"), *options)
    single = 3 if "coupled-grpo" in options else 1
    one = planned(*model, "-k", single)["update"]["flops"] / single
    assert planned(*model)["update"]["flops"] == pytest.approx(masks * one, rel=1e-6)


def test_images_have_a_stage_more_and_are_for_models_that_take_them(tmp_path, saved_models):
    save_policy(tiny_vision_policy(), tmp_path)
    options = ("-m", tmp_path, "--algo", "srpo")
    without, with_image = planned(*options), planned(*options, "--image-tokens", 8)
    assert [*without] == ["rollout", "advantage", "update", "step"]
    assert with_image["update"]["flops"] > without["update"]["flops"]
    assert with_image["update"]["activations"] > without["update"]["activations"]
    spread = planned(*options, "--image-tokens", 8, "--gpus", 2)
    assert spread["update"]["weights"] < 0.6 * with_image["update"]["weights"]
    assert spread["update"]["gather"] > 0
    refused = invoke("plan", "-m", saved_models("ar"), "--image-tokens", 8)
    assert (refused.exit_code, "takes no images" in refused.output) == (2, True)


def test_changes_that_would_fit_do(saved_models):
    model = ("-m", saved_models("llada"), "--batch-size", 64)
    needed = planned(*model)["step"]["total"]
    memory = f"{int(needed * 0.8 / 1024)}K"
    short = planned(*model, "--gpu-memory", memory)["step"]
    assert short["fits"] is False
    assert short["changes"]
    for change in {short["changes"][0], short["changes"][-1]}:
        again = planned("-m", saved_models("llada"), "--gpu-memory", memory, *change.split())
        assert again["step"]["fits"], change


def test_a_measured_speed_gives_time_and_cost(saved_models):
    rows = planned(
        "-m", saved_models("llada"), "--tokens-per-second", 96, "--gpus", 2, "--bandwidth", 1e-3,
        "--total-steps", 900, "--price", 3,
    )  # fmt: skip
    rollout, update, step = rows.values()
    assert rollout["seconds"] == 32 * 2 * 12 / 96 / 2
    speed = rollout["flops"] / 2 / rollout["seconds"]
    assert update["compute_seconds"] == pytest.approx(update["flops"] / 2 / speed)
    moved = update["gather"] + update["scatter"]
    assert update["traffic_seconds"] == pytest.approx(moved / 1e6)
    assert step["hours"] == pytest.approx(step["seconds"] / 4)
    assert step["cost"] == pytest.approx(step["hours"] * 2 * 3)


def test_what_is_no_model_is_refused(tmp_path):
    assert invoke("plan", "-m", tmp_path / "none").exit_code == 66
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "resnet"}')
    assert invoke("plan", "-m", tmp_path).exit_code == 65
    shape = {"model_type": "llada", "d_model": 32, "n_layers": 1, "n_heads": 4, "vocab_size": 9}
    for wrong in ({"n_kv_heads": 3}, {"embedding_size": 0, "vocab_size": 0}):
        file.write_text(json.dumps({**shape, "mlp_hidden_size": 8, "mask_token_id": 1, **wrong}))
        refused = invoke("plan", "-m", file)
        assert (refused.exit_code, str(file) in refused.output) == (65, True), refused.output


def test_the_table_has_a_column_for_each_stage(capsys):
    from dlmctl.commands.plan import _table

    _table([
        {"stage": "rollout", "weights": 16_031_162_368, "flops": 2e15, "fits": True, "cache": 0},
        {"stage": "step", "total": 2_500_000, "flops": 3e15, "fits": False},
    ])  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        ["rollout", "step"],
        ["weights", "16.03", "GB"],
        ["total", "at", "once", "2.50", "MB"],
        ["fits", "yes", "no"],
        ["PFLOP", "2", "3"],
    ]
