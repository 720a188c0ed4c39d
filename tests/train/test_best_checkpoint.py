"""`update --eval`: what is evaluated and when, the best checkpoint, the early end, and failures."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest
from conftest import invoke, shell

STEPS = 6
"""Records of `data`, of which each step takes one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("new") / "model"
    sizes = ["--hidden-size", "8", "--layers", "1", "--heads", "1"]
    assert invoke("init", directory, *sizes).exit_code == 0
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    asked = ["prompts", "sudoku", "-n", str(STEPS), "--completions", "-o", path]
    assert invoke(*asked).exit_code == 0
    return path


def results(values: str) -> str:
    """A command whose result for the model of the beginning is the first value, then those of the
    checkpoints of steps 1, 2, …"""
    return (
        f"v=({values}); s=${{DLMCTL_MODEL##*step-}}; [[ $s =~ ^[0-9]+$ ]] || s=0; "
        'echo "{\\"reward\\": ${v[10#$s]}}"'
    )


def train(run: Path, data: Path, model: Path, *options: object):
    return invoke(
        "update", "--algo", "sft", "--prompts-per-step", 1, "--save-every", 1, "--keep", 1,
        "-m", model, "-o", run, data, *options,
    )  # fmt: skip


def evaluations(run: Path, measure: str = "reward") -> list[tuple[int, float]]:
    rows = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    return [(row["step"], row["eval"][measure]) for row in rows if "eval" in row]


def best(run: Path) -> str:
    return os.readlink(run / "best")


def test_the_best_checkpoint_is_kept_beside_the_newest(model, data, tmp_path) -> None:
    run = tmp_path / "run"
    done = train(run, data, model, "--eval", results("0.1 0.2 0.5 0.3 0.5 0.4 0.1"))
    assert done.exit_code == 0, done.stderr
    assert evaluations(run) == [*enumerate([0.1, 0.2, 0.5, 0.3, 0.5, 0.4, 0.1])]
    assert best(run) == "step-000002"  # the earlier of two that are as good
    assert sorted(path.name for path in run.glob("step-*")) == ["step-000002", "step-000006"]
    shown = [orjson.loads(line) for line in done.stdout.splitlines()]
    assert [row["step"] for row in shown if "eval" in row] == [*range(7)]
    assert [row["step"] for row in shown if "loss" in row] == [*range(1, 7)]


def test_the_lowest_mean_of_another_field_can_be_the_best(model, data, tmp_path) -> None:
    run = tmp_path / "run"
    command = results("9 4 3 5 2 7 8").replace('{\\"reward\\": ', '{\\"a\\": {\\"b\\": ')
    command = command.replace('}"', '}}"')
    options = ["--eval", command, "--eval-measure", "a.b", "--eval-goal", "lowest"]
    done = train(run, data, model, *options)
    assert done.exit_code == 0, done.stderr
    assert best(run) == "step-000004"
    assert dict(evaluations(run, "a.b"))[4] == 2


def test_evaluations_are_so_many_steps_apart_and_one_is_the_last(model, data, tmp_path) -> None:
    run = tmp_path / "run"
    values = results("0 1 2 3 4 5 6")
    assert train(run, data, model, "--eval", values, "--eval-every", 4).exit_code == 0
    assert [step for step, _ in evaluations(run)] == [0, 4, 6]


def test_training_ends_after_evaluations_that_are_no_better(model, data, tmp_path) -> None:
    run = tmp_path / "run"
    options = ["--eval", results("0.1 0.6 0.5 0.6 0.9 0.9 0.9"), "--patience", 2]
    done = train(run, data, model, *options)
    assert done.exit_code == 0
    assert "reward was 0.6 after step 1, and no better in 2 evaluations since" in done.stderr
    assert [step for step, _ in evaluations(run)] == [0, 1, 2, 3]
    assert os.readlink(run / "latest") == "step-000003"
    again = train(run, data, model, *options)
    assert again.exit_code == 0
    assert again.stdout == ""
    assert "no better in 2 evaluations since" in again.stderr
    assert os.readlink(run / "latest") == "step-000003"


def test_the_model_of_the_beginning_counts_for_patience_and_is_not_linked(
    model, data, tmp_path
) -> None:
    run = tmp_path / "run"
    done = train(run, data, model, "--eval", results("1 0.2 0.3 0.1"), "--patience", 3)
    assert "reward was 1 after step 0" in done.stderr
    assert best(run) == "step-000002"


def test_a_run_that_resumes_knows_its_best(model, data, tmp_path) -> None:
    run, first = tmp_path / "run", tmp_path / "first.jsonl"
    first.write_bytes(b"".join(data.read_bytes().splitlines(keepends=True)[:3]))
    command = ["--eval", results("0.1 0.7 0.5 0.4 0.6 0.5 0.5")]
    assert train(run, first, model, *command).exit_code == 0
    (run / "best").unlink()  # killed before it was there
    assert train(run, data, model, *command, "--resume").exit_code == 0
    assert [step for step, _ in evaluations(run)] == [*range(7)]
    assert best(run) == "step-000001"
    assert (run / "best" / "dlmctl.json").exists()


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("exit 3", "'exit 3' failed with exit code 3"),
        ("false | echo '{\"reward\": 1}'", "failed with exit code 1"),
        ("true", "it wrote no record"),
        ("echo 12", "--eval, record 1: b'12' is no record"),
        ("echo '{\"reward\": 1}'; echo '{\"a\": 1}'", "record 2: it has no number 'reward'"),
        ('echo \'{"error": "too long"}\'', "it has no number 'reward': too long"),
        ('echo \'{"reward": "1"}\'', "it has no number 'reward'; see --eval-measure"),
    ],
)
def test_an_evaluation_that_fails_ends_training_before_its_first_step(
    command: str, said: str, model, data, tmp_path
) -> None:
    run = tmp_path / "run"
    done = train(run, data, model, "--eval", command)
    assert done.exit_code == 65
    assert said in done.stderr
    assert not (run / "latest").exists()


def test_an_evaluation_that_fails_later_leaves_its_checkpoint(model, data, tmp_path) -> None:
    run = tmp_path / "run"
    fails = results("0 1 2 3") + "; [[ $s != *2 ]]"
    done = train(run, data, model, "--eval", fails)
    assert done.exit_code == 65
    assert os.readlink(run / "latest") == "step-000002"
    assert evaluations(run) == [(0, 0), (1, 1)]
    assert train(run, data, model, "--eval", results("0 1 2 3 4 5 6"), "--resume").exit_code == 0
    assert [step for step, _ in evaluations(run)] == [*range(7)]


def test_options_without_a_command_are_refused(model, data, tmp_path) -> None:
    done = train(tmp_path / "run", data, model, "--patience", 2)
    assert done.exit_code == 2
    assert "need --eval" in done.stderr


def test_the_error_is_over_prompts(model, data, tmp_path) -> None:
    run, rows = tmp_path / "run", [("a", 0), ("a", 1), ("b", 1), ("b", 1), ("c", 0), ("c", 0)]
    lines = "".join(f'{{"id": "{key}", "reward": {value}}}\n' for key, value in rows)
    (tmp_path / "rows").write_text(lines)
    assert train(run, data, model, "--eval", f"cat {tmp_path}/rows").exit_code == 0
    row = orjson.loads((run / "metrics.jsonl").read_bytes().splitlines()[0])["eval"]
    # Means of the prompts 0.5, 1 and 0, of which the mean has the error sqrt(0.25 / 3).
    assert row["reward"] == 0.5
    assert row["reward_se"] == pytest.approx((0.25 / 3) ** 0.5)
    assert row["prompts"] == 3


def test_a_pipe_of_commands_evaluates_a_training_loop_and_ends_it(model, tmp_path) -> None:
    done = shell(
        f"""
        dlmctl prompts sudoku -n 8 > prompts.jsonl
        dlmctl rollout -q -m {model} --follow run --prompts 2 -n 2 --rounds 4 prompts.jsonl |
        dlmctl verify -q | dlmctl update -q --algo grpo --prompts-per-step 2 -o run --patience 2 \\
            --eval 'dlmctl prompts sudoku --split test -n 3 | dlmctl rollout -q -n 2 |
                dlmctl verify -q | jq -c ".reward = 0.5"' > metrics.jsonl
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert evaluations(tmp_path / "run") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    rows = [orjson.loads(x) for x in (tmp_path / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["eval"]["prompts"] for row in rows if "eval" in row] == [3, 3, 3]
    assert "training ends (--patience 2)" in done.stderr
