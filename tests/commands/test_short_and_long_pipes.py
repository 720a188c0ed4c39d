"""`update` alone, and behind `advantage` and `score-elbo`: the same step, for every algorithm."""

from __future__ import annotations

import orjson
import pytest
import torch
from conftest import invoke, read_jsonl

from dlmctl.models.loading import load_policy
from dlmctl.settings.algorithms import RECIPES

SEEN = ("loss", "advantage_std", "grad_norm", "kl", "clipped", "pairs", "bound_gap")


def written(path, rows):
    path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def verified(tmp_path_factory, saved_models):
    """Three groups of four with rewards of several values, and a weight for each token.

    They are sampled from left to right, as one algorithm requires.
    """
    folder = tmp_path_factory.mktemp("verified")
    sampler = ("--gen-length", "8", "--block-length", "1", "--temperature", "3")
    made = invoke(
        "rollout", "-q", "-m", saved_models("llada"), "--task", "sudoku", "--prompts", "3",
        "-n", "4", *sampler, "-o", folder / "sampled.jsonl",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    rows = read_jsonl(folder / "sampled.jsonl")
    for n, row in enumerate(rows):
        row["reward"] = [1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 1.0, 0.25, 0.0, 0.0, 1.0, 1.0][n]
        row["weights"] = [1.0 + 0.1 * (t % 3) for t in range(8)]
    return written(folder / "verified.jsonl", rows)


def update(folder, name, algo, source, *options):
    """Metrics of the steps and the weights they lead to."""
    options = ("--lr", "1e-2", "--prompts-per-step", "2", *options)
    inner = ("--inner", str(min(2, RECIPES[algo].inner)))
    done = invoke("update", "-q", "--algo", algo, *options, *inner, source, "-o", folder / name)
    assert done.exit_code == 0, done.output
    metrics = read_jsonl(folder / name / "metrics.jsonl")
    weights = load_policy(str(folder / name), "cpu").model.state_dict()
    return [{key: row.get(key) for key in SEEN} for row in metrics], weights


def long(folder, algo, source, *options):
    """The records behind the stages between `verify` and `update`."""
    scored, made = folder / "scored.jsonl", folder / "made.jsonl"
    model = read_jsonl(source)[0]["rollout"]["model"]
    labels = ("-m", f"policy={model}", "-m", f"reference={model}")
    done = invoke("score-elbo", "-q", *labels, source, "-o", scored)
    assert done.exit_code == 0, done.output
    plain = "grpo" if algo == "srpo" else algo  # its weights are there, and would be made again
    done = invoke("advantage", "-q", "--algo", plain, *options, scored, "-o", made)
    assert done.exit_code == 0, done.output
    return made


@pytest.mark.parametrize("algo", [algo for algo in RECIPES if algo != "sft"])
def test_both_pipes_make_the_same_steps(tmp_path, verified, algo):
    made = long(tmp_path, algo, verified)
    short, after = update(tmp_path, "short", algo, verified)
    again, then = update(tmp_path, "long", algo, made)
    steps = min(2, RECIPES[algo].inner)
    assert len(short) == 2 * steps
    assert short == again
    assert short[0]["grad_norm"] > 0
    for name, weight in after.items():
        assert torch.equal(weight, then[name])


def test_both_pipes_scale_by_the_same_batch(tmp_path, verified):
    options = ("--scale", "batch")
    made = long(tmp_path, "espo", verified, *options, "--prompts-per-step", "2")
    short = update(tmp_path, "short", "espo", verified, *options)
    again = update(tmp_path, "long", "espo", made, *options)
    assert short[0] == again[0]
    plain = update(tmp_path, "plain", "espo", verified)
    assert plain[0][0]["advantage_std"] != short[0][0]["advantage_std"]


@pytest.mark.parametrize(
    ("algo", "expected"),
    [("rspo", 0.75), ("espo", 1.0), ("gdsd", 1.0), ("grpo", 0.75 / 0.5001), ("wd1", 0.75)],
)
def test_advantages_go_by_the_algorithm(tmp_path, algo, expected):
    rows = [{"id": 1, "reward": reward} for reward in (1, 0, 0, 0)]
    source, target = written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert invoke("advantage", "--algo", algo, source, "-o", target).exit_code == 0
    assert [row["advantage"] for row in read_jsonl(target)] == pytest.approx(
        [expected, *[-expected / 3] * 3], rel=1e-12
    )


def test_an_update_by_another_algorithm_refuses_the_advantages(tmp_path, verified):
    made = tmp_path / "made.jsonl"
    invoke("advantage", "-q", "--algo", "grpo", verified, "-o", made)
    done = invoke("update", "-q", "--algo", "espo", made, "-o", tmp_path / "run")
    assert done.exit_code == 65
    assert f"{made}:1: its advantage was made with --baseline mean --scale group" in done.stderr
    assert "dlmctl advantage --baseline loo --scale none" in done.stderr
    options = ("--baseline", "mean", "--scale", "group")
    assert update(tmp_path, "asked", "espo", made, *options)


def test_records_that_name_two_models_need_one_to_be_named(tmp_path, verified, saved_models):
    rows = read_jsonl(verified)
    for row in rows[4:8]:
        row["rollout"]["model"] = saved_models("ar")
    mixed = written(tmp_path / "mixed.jsonl", rows)
    done = invoke("update", "-q", mixed, "-o", tmp_path / "run")
    assert done.exit_code == 65
    assert f"{mixed}:5: sampled from {saved_models('ar')}" in done.stderr
    named = invoke("update", "-q", "-m", saved_models("llada"), mixed, "-o", tmp_path / "named")
    assert named.exit_code == 0, named.output


def test_errors_before_the_first_sample_do_not_choose_the_model(tmp_path, verified, saved_models):
    rows = [{"line": "{", "error": {"message": "no JSON"}}, *read_jsonl(verified)]
    source = written(tmp_path / "in.jsonl", rows)
    assert invoke("update", "-q", source, "-o", tmp_path / "run").exit_code == 0
    progress = orjson.loads((tmp_path / "run/latest/dlmctl.json").read_bytes())
    assert progress["reference"] == saved_models("llada")


def test_what_an_algorithm_has_no_use_for_is_refused(tmp_path, verified, saved_models):
    for options, said in (
        (("--algo", "sft", "--clip", "0.3"), "--clip means nothing to --algo sft; it has: none"),
        (("--algo", "sft", "--baseline", "loo"), "--baseline means nothing to --algo sft"),
        (("--algo", "sft", "--drop-zero-adv"), "--drop-zero-adv means nothing to --algo sft"),
        (("--algo", "espo", "--fill-to", "64"), "--fill-to is for --algo sft and vrpo"),
        (("--algo", "espo", "--scale", "group", "--baseline", "none"), "--baseline none"),
        (("--algo", "gdsd", "-m", saved_models("ar")), "gdsd trains diffusion models alone"),
        (("--algo", "gdsd", "--masks", "independent"), "--masks complementary or stratified"),
    ):
        done = invoke("update", "-q", *options, verified, "-o", tmp_path / "run")
        assert (done.exit_code, said in done.stderr) == (2, True), done.output
    planned = invoke("plan", "--algo", "gdsd", "-m", saved_models("ar"))
    assert (planned.exit_code, "diffusion models alone" in planned.stderr) == (2, True)
