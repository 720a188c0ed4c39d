"""Whole pipes of real processes, as a user types them."""

import json
import subprocess

import pytest
import torch
from conftest import HANGS, read_jsonl, shell
from preload import dlmctl_script
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.models.loading import load_policy

SMALL = "--gen-length 4 --block-length 4 --steps 4"


def weights(directory):
    return load_policy(str(directory), "cpu").model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_line_of_the_readme_works_with_no_input_at_all(tmp_path):
    done = shell(
        "dlmctl rollout --prompts 4 -n 2 | dlmctl verify | dlmctl update --algo rspo",
        tmp_path,
        fresh=True,
    )
    assert done.returncode == 0, done.stderr
    assert "writing runs/rspo-1" in done.stderr
    [metrics] = [json.loads(line) for line in done.stdout.splitlines()]
    assert (metrics["prompts"], metrics["completions"]) == (4, 8)
    assert (tmp_path / "runs/rspo-1/latest/model.safetensors").exists()
    assert read_jsonl(tmp_path / "runs/rspo-1/metrics.jsonl") == [metrics]
    again = shell("dlmctl rollout --prompts 2 | dlmctl verify | dlmctl update", tmp_path)
    assert "writing runs/rspo-2" in again.stderr


def test_the_short_pipe_and_the_long_pipe_make_the_same_step(tmp_path, saved_models):
    model = saved_models("llada")
    made = shell(
        f"dlmctl prompts sudoku -n 4 | dlmctl rollout -m {model} -n 3 --gen-length 16 "
        "--temperature 3 | dlmctl verify --verifier sudoku-cells -o v.jsonl",
        tmp_path,
    )
    assert made.returncode == 0, made.stderr
    options = f"--algo rspo -m {model} --lr 1e-2 --lambda 0.1 -k 4 --prompts-per-step 2"
    short = shell(f"dlmctl update {options} -o short v.jsonl", tmp_path)
    assert short.returncode == 0, short.stderr
    # The second step is taken by weights that the scores of the first half know nothing of.
    for half, lines in (("first", "head -6"), ("second", "tail -6")):
        policy = model if half == "first" else "long"
        long = shell(
            f"{lines} v.jsonl | "
            f"dlmctl score-elbo -m policy={policy} -m reference={model} -k 4 | "
            f"dlmctl advantage | tee scored-{half}.jsonl | dlmctl update {options} -o long",
            tmp_path,
            fresh=half == "first",
        )
        assert long.returncode == 0, long.stderr
    assert (
        read_jsonl(tmp_path / "scored-second.jsonl")[0]["elbo"]["policy"]["value"]
        != (read_jsonl(tmp_path / "scored-second.jsonl")[0]["elbo"]["reference"]["value"])
    )
    assert same(weights(tmp_path / "short"), weights(tmp_path / "long"))
    ours, theirs = (read_jsonl(tmp_path / d / "metrics.jsonl") for d in ("short", "long"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-9)


def test_a_loop_in_one_pipe_trains_round_after_round_and_resumes(tmp_path, saved_models):
    model = saved_models("llada")

    (tmp_path / "checks.py").write_text("def place(record): return record['sample'] % 2")

    def loop(rounds, run):
        return shell(
            f"dlmctl rollout --follow {run} -m {model} --rounds {rounds} --prompts 2 -n 2 {SMALL} |"
            f" dlmctl verify --verifier checks:place | tee -a {run}.jsonl |"
            f" dlmctl update --lr 1e-2 -o {run}",
            tmp_path,
        )

    whole = loop(4, "whole")
    assert whole.returncode == 0, whole.stderr
    metrics = [json.loads(line) for line in whole.stdout.splitlines()]
    assert [m["round"] for m in metrics] == [0, 1, 2, 3]
    records = read_jsonl(tmp_path / "whole.jsonl")
    revisions = [r["rollout"]["revision"] for r in records]
    assert len(set(revisions)) == 4
    assert [r["rollout"]["round"] for r in records] == [n // 4 for n in range(16)]
    loop(2, "parts")
    rest = loop(4, "parts")
    assert rest.returncode == 0, rest.stderr
    assert [json.loads(line)["round"] for line in rest.stdout.splitlines()] == [2, 3]
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_record_that_failed_does_not_stop_a_loop_with_advantage_in_it(tmp_path, saved_models):
    (tmp_path / "checks.py").write_text(
        "from dlmctl.records.errors import DataError\n"
        "def place(record):\n"
        "    if record['sample'] == 1: raise DataError('no')\n"
        "    return record['sample']\n"
    )
    for stage in ("cat", "dlmctl advantage", "dlmctl advantage --scale batch"):
        scale = "--scale batch" if "batch" in stage else ""
        run = f"run-{len(stage)}"
        done = shell(
            f"dlmctl rollout --follow {run} -m {saved_models('llada')} --rounds 2 --prompts 2 -n 3 "
            f"{SMALL} | dlmctl verify --verifier checks:place --on-error keep | {stage} | "
            f"dlmctl update --lr 1e-2 {scale} -o {run}",
            tmp_path,
        )
        assert done.returncode == 0, done.stderr
        seen = [(m["round"], m["completions"]) for m in map(json.loads, done.stdout.splitlines())]
        assert seen == [(0, 4), (1, 4)]
    assert same(weights(tmp_path / "run-3"), weights(tmp_path / "run-16"))


def test_a_round_is_trained_on_by_the_run_that_it_was_sampled_from(tmp_path, saved_models):
    (tmp_path / "checks.py").write_text("def place(record): return record['sample'] % 2")
    loop = (
        f"dlmctl rollout --follow a -m {saved_models('llada')} --rounds 2 --prompts 1 -n 2 {SMALL} "
        "| dlmctl verify --verifier checks:place | tee a.jsonl | dlmctl update --lr 1e-2 -o a"
    )
    assert shell(loop, tmp_path).returncode == 0
    # Another rate: the weights after the first round are others.
    again = shell("dlmctl update --lr 2e-2 -o b a.jsonl", tmp_path)
    assert again.returncode == 65
    assert "a.jsonl:3: sampled from weights" in again.stderr
    assert len(read_jsonl(tmp_path / "b/metrics.jsonl")) == 1
    assert shell("dlmctl update --any-policy -o c a.jsonl", tmp_path).returncode == 0


def test_lag_one_samples_a_round_while_the_one_before_is_trained_on(tmp_path, saved_models):
    (tmp_path / "checks.py").write_text("def place(record): return record['sample'] % 2")
    done = shell(
        f"dlmctl rollout --follow a -m {saved_models('llada')} --rounds 4 --max-lag 1 --prompts 1 "
        f"-n 2 {SMALL} | dlmctl verify --verifier checks:place | tee a.jsonl | "
        "dlmctl update --lr 1e-2 -o a",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line)["round"] for line in done.stdout.splitlines()]
    assert rounds == [0, 1, 2, 3]
    revisions = [r["rollout"]["revision"] for r in read_jsonl(tmp_path / "a.jsonl")][::2]
    assert revisions[0] == revisions[1]


def test_the_end_of_the_last_stage_ends_all_that_wait(tmp_path, saved_models):
    # After its two records the sampler waits for a checkpoint, and the verifier for records.
    done = shell(
        f"dlmctl rollout --follow run -m {saved_models('llada')} --rounds 1000 --prompts 1 -n 2 "
        f"{SMALL} | dlmctl verify --verifier sudoku-cells | head -1 > one.jsonl",
        tmp_path,
    )
    assert len(read_jsonl(tmp_path / "one.jsonl")) == 1
    assert done.stderr == ""


def test_rollout_writes_its_first_record_before_its_last_input_arrives(tmp_path, saved_models):
    command = [dlmctl_script(), "rollout", "-m", saved_models("llada")]
    process = subprocess.Popen(
        [*command, "-n", "2", "--batch-size", "2", *SMALL.split()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdin.write(b'{"id": "a", "prompt": "12="}\n')
    process.stdin.flush()
    first = json.loads(process.stdout.readline())
    assert first["id"] == "a"
    process.stdin.write(b'{"id": "b", "prompt": "34="}\n')
    process.stdin.close()
    assert [json.loads(line)["id"] for line in process.stdout] == ["a", "b", "b"]
    assert process.wait(HANGS) == 0


def test_the_same_seed_gives_the_same_bytes_whatever_the_batch(tmp_path, saved_models):
    outputs = []
    for size in (1, 5, 64):
        done = shell(
            "dlmctl prompts countdown -n 4 --seed 3 | dlmctl rollout --temperature 1 -n 3 "
            f"-m {saved_models('llada')} --batch-size {size}",
            tmp_path,
            fresh=size == 1,
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].count("\n") == 12


def test_a_bad_line_names_file_and_line_and_keeps_what_was_made(tmp_path, saved_models):
    (tmp_path / "p.jsonl").write_text('{"id":"a","prompt":"12="}\n{"id":"b"}\n{"id":"c"')
    model = saved_models("llada")
    done = shell(f"dlmctl rollout -m {model} -n 1 -b 1 {SMALL} p.jsonl -o out.jsonl", tmp_path)
    assert done.returncode == 65
    assert "p.jsonl:2: the record has no 'prompt'" in done.stderr
    assert "out.jsonl.partial" in done.stderr
    assert [r["id"] for r in read_jsonl(tmp_path / "out.jsonl.partial")] == ["a"]
    kept = shell(f"dlmctl rollout -m {model} -n 1 {SMALL} --on-error keep p.jsonl", tmp_path)
    assert kept.returncode == 0
    records = [json.loads(line) for line in kept.stdout.splitlines()]
    assert [("error" in r) for r in records] == [False, True, True]
    assert "p.jsonl:3" in records[2]["error"]["where"]


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("dlmctl update < /dev/null", 2, "no records came in"),
        ("dlmctl advantage <<< '{\"id\":1}'", 65, "<stdin>:1: field 'reward' is missing"),
        ("dlmctl rollout -m MODEL --prompts 1 > /dev/full", 74, "standard output"),
        ("dlmctl update --schedule cosine <<< '{}'", 2, "--total-steps"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_exit_code(
    tmp_path, saved_models, line, code, message
):
    done = shell(line.replace("MODEL", saved_models("llada")), tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len([x for x in done.stderr.splitlines() if "partial" not in x]) <= 2


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("rollout -m MODEL nothing.jsonl", 66, "cannot read nothing.jsonl"),
        ("rollout -m ./no-model --task sudoku", 66, "no model at ./no-model"),
        ("rollout -m MODEL --gen-length 64 --block-length 8 --steps 4", 2, "--steps 4"),
        ("rollout -m MODEL --task sudoku --prompts 1 -o /proc/no/file", 73, "/proc/no/file"),
        ("score-elbo -m MODEL -k 3 sound.jsonl", 2, "pairs"),
        ("score-elbo -m MODEL poor.jsonl", 65, "poor.jsonl:1: field 'completion'"),
        ("bench rollout -m MODEL --paths exact,best sound.jsonl", 2, "no 'best'"),
        ("bench rollout -m random:tiny --prompt-lengths 9-3", 2, "--prompt-lengths 9-3"),
        ("init .", 73, "not empty"),
        ("init x --hidden-size 30 --heads 4", 2, "--hidden-size 30"),
    ],
)
def test_what_is_wrong_without_a_pipe_is_said_in_one_line_with_its_exit_code(
    tmp_path, monkeypatch, saved_models, line, code, message
):
    (tmp_path / "sound.jsonl").write_text('{"id":1,"prompt":"1","completion":"2"}')
    (tmp_path / "poor.jsonl").write_text('{"id":1,"prompt":"1"}')
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, line.replace("MODEL", saved_models("llada")).split())
    assert done.exit_code == code, done.stderr
    assert message in done.stderr
    assert len([x for x in done.stderr.splitlines() if "partial" not in x]) <= 2


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, saved_models, monkeypatch):
    from dlmctl.records.errors import CannotWriteError
    from dlmctl.train import checkpoint as module
    from dlmctl.train.checkpoint import latest_checkpoint
    from dlmctl.train.lora import Adapter
    from dlmctl.train.run import Optimizer, open_run

    run = open_run(
        tmp_path / "run", saved_models("llada"), "rspo", Optimizer(), Adapter(), "cpu",
        "auto", False, 0,
    )  # fmt: skip
    run.progress.step = 1
    run.save(2)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    run.progress.step = 2
    with pytest.raises(CannotWriteError, match="No space left"):
        run.save(2)
    assert latest_checkpoint(tmp_path / "run").name == "step-000001"
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        ".lock", "latest", "step-000001",
    ]  # fmt: skip
    load_policy(str(tmp_path / "run"), "cpu")


def test_scores_made_with_other_masks_are_not_subtracted(tmp_path, saved_models):
    model = saved_models("llada")
    made = (
        f"dlmctl rollout -m {model} --prompts 2 -n 2 {SMALL} | dlmctl verify "
        "--verifier sudoku-cells | "
    )
    done = shell(
        f"{made} dlmctl score-elbo -m policy={model} | "
        f"dlmctl score-elbo -m reference={model} --seed 2 | dlmctl update -o run",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "scores 'reference' of the records are not used" in done.stderr
    assert "seed 2 instead of 0" in done.stderr
    without = shell(f"{made} dlmctl update -o plain", tmp_path)
    assert json.loads(done.stdout)["kl"] == json.loads(without.stdout)["kl"]


def test_two_processes_score_the_same_masks(tmp_path, saved_models):
    model = saved_models("llada")
    made = f"dlmctl rollout -m {model} --prompts 2 -n 2 {SMALL} | "
    together = shell(f"{made} dlmctl score-elbo -m a={model} -m b={model} -k 6", tmp_path)
    apart = shell(
        f"{made} dlmctl score-elbo -m a={model} -k 6 | dlmctl score-elbo -m b={model} -k 6",
        tmp_path,
    )
    assert together.stdout == apart.stdout
    scores = json.loads(together.stdout.splitlines()[0])["elbo"]
    assert scores["a"] == scores["b"]
    assert len(scores["a"]["samples"]) == 6


@pytest.mark.parametrize("family", ["dream", "a2d", "mlm", "ar"])
def test_every_family_goes_through_the_whole_pipe(tmp_path, saved_models, family):
    model = saved_models(family)
    done = shell(
        f"dlmctl rollout -m {model} --prompts 2 -n 2 {SMALL} | dlmctl verify "
        f"--verifier sudoku-cells | dlmctl score-elbo -m s={model} | "
        "dlmctl update -o run --lr 1e-3",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["completions"] == 4
    assert load_policy(str(tmp_path / "run"), "cpu").family == family


def test_supervised_training_and_init_make_a_model_from_nothing(tmp_path):
    done = shell(
        "dlmctl init new --hidden-size 16 --layers 1 --heads 2 --gen-length 16 && "
        "dlmctl prompts countdown -n 20 --completions | "
        "dlmctl update --algo sft -m new -o base --fill-to 16 --prompts-per-step 5 && "
        "dlmctl rollout -m base --prompts 1 -n 1 --task countdown",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["task"] == "countdown"


def test_a_task_that_is_asked_for_wins_over_an_input_that_happens_to_be_a_pipe(tmp_path):
    # Such an input is what `make -j` gives its jobs.
    line = "true | dlmctl rollout -q --task countdown --prompts 1 -n 1 | grep -c countdown"
    assert shell(line, tmp_path).stdout == "1\n"
    silent = shell("true | dlmctl rollout -q", tmp_path)
    assert (silent.stdout, silent.returncode) == ("", 0)
    assert "no prompts came in" in silent.stderr
    (tmp_path / "p.jsonl").write_text('{"id": "a", "prompt": "1"}\n')
    both = shell("dlmctl rollout --task sudoku p.jsonl", tmp_path)
    assert both.returncode == 2
    assert "not from both" in both.stderr
