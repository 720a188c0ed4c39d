"""`--shard I/N` of every stage: the outputs one after another are the output of a single run."""

from __future__ import annotations

import os
from pathlib import Path

import orjson
import pytest
from conftest import invoke, read_jsonl, shell
from typer.testing import Result

from dlmctl.tasks.sources import GENERATORS

SMALL = (
    "--gen-length",
    "8",
    "--block-length",
    "4",
    "--steps",
    "8",
    "-n",
    "3",
    "--temperature",
    "2",
)
COUNT = 4


def parts(tmp_path: Path, *line: str | Path, count: int = COUNT) -> list[bytes]:
    """What each shard writes, made in another order than theirs."""
    made = {}
    for number in reversed(range(1, count + 1)):
        output = tmp_path / f"part-{number}"
        result = invoke(*map(str, line), "--shard", f"{number}/{count}", "-o", output)
        assert result.exit_code == 0, result.output
        made[number] = output.read_bytes()
    return [made[number] for number in range(1, count + 1)]


def whole(tmp_path: Path, *line: str | Path) -> bytes:
    result = invoke(*map(str, line), "-o", tmp_path / "whole")
    assert result.exit_code == 0, result.output
    return (tmp_path / "whole").read_bytes()


def assert_equal_in_parts(tmp_path: Path, *line: str | Path, count: int = COUNT) -> list[bytes]:
    made = parts(tmp_path, *line, count=count)
    assert b"".join(made) == whole(tmp_path, *line)
    return made


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    assert invoke("prompts", "countdown", "-n", "6", "-o", path).exit_code == 0
    return path


@pytest.fixture(scope="module")
def sampled(tmp_path_factory, prompts, saved_models) -> Path:
    path = tmp_path_factory.mktemp("sampled") / "samples.jsonl"
    result = invoke("rollout", "-m", saved_models("llada"), *SMALL, prompts, "-o", path)
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize("source", GENERATORS)
def test_prompts_that_are_made_on_the_spot(tmp_path, source):
    made = assert_equal_in_parts(tmp_path, "prompts", source, "-n", "10", "--seed", "3")
    assert [part.count(b"\n") for part in made] == [3, 2, 3, 2]


@pytest.mark.parametrize("limit", [(), ("-n", "7")])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_prompts_of_a_file(tmp_path, kind, limit):
    path = tmp_path / f"in.{kind}"
    rows = [f"{n},{n} apples and 1?" for n in range(9)]
    lines = [orjson.dumps({"question": row}).decode() for row in rows]
    lines[4] = "nonsense"
    rows.insert(4, "1,2,3,4")
    path.write_text("\n".join(["answer,question", *rows] if kind == "csv" else lines) + "\n")
    on_error = "skip" if limit else "keep"
    made = assert_equal_in_parts(tmp_path, "prompts", path, "--on-error", on_error, *limit)
    assert b"".join(made).count(b"\n") == (7 if limit else 10 if kind == "csv" else 9)


def test_rollout_of_a_file_with_groups_whole(tmp_path, saved_models, prompts):
    made = assert_equal_in_parts(tmp_path, "rollout", "-m", saved_models("llada"), *SMALL, prompts)
    assert [part.count(b"\n") for part in made] == [6, 3, 6, 3]


def test_rollout_of_an_autoregressive_model_up_to_the_last_digits(tmp_path, saved_models, prompts):
    """Its log-probabilities are in the records, and depend on the neighbours in a batch."""
    line = ("rollout", "-m", saved_models("ar"), "-n", "2", "--gen-length", "4", prompts)
    made = b"".join(parts(tmp_path, *line, count=2))
    rows, single = (
        [orjson.loads(r) for r in m.splitlines()] for m in (made, whole(tmp_path, *line))
    )
    for ours, theirs in zip(rows, single, strict=True):
        log_probs = ours["rollout"].pop("log_probs"), theirs["rollout"].pop("log_probs")
        assert log_probs[0] == pytest.approx(log_probs[1], rel=1e-5)
        assert ours == theirs


def test_rollout_of_a_task(tmp_path, saved_models):
    line = ("rollout", "-m", saved_models("llada"), "--task", "sudoku", "--prompts", "5", *SMALL)
    made = assert_equal_in_parts(tmp_path, *line, count=3)
    assert [part.count(b"\n") for part in made] == [6, 6, 3]


def test_verify_and_advantage(tmp_path, sampled):
    line = ("verify", "--verifier", "countdown", "--verifier", "format", "--weight", "format=0.5")
    assert_equal_in_parts(tmp_path, *line, sampled)
    verified = tmp_path / "verified.jsonl"
    rows = read_jsonl(sampled)
    for place, row in enumerate(rows):
        row["reward"] = place % 5
    verified.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    for scale in ("none", "group"):
        made = assert_equal_in_parts(tmp_path, "advantage", "--scale", scale, verified)
        for part in made:
            ids = [orjson.loads(line)["id"] for line in part.splitlines()]
            assert len(ids) == 3 * len(set(ids)) > 0


def test_score_elbo_up_to_the_last_digits(tmp_path, saved_models, sampled):
    line = ("score-elbo", "-m", saved_models("llada"), "-k", "4", sampled)
    ours = [orjson.loads(row) for part in parts(tmp_path, *line) for row in part.splitlines()]
    single = [orjson.loads(row) for row in whole(tmp_path, *line).splitlines()]
    for a, b in zip(ours, single, strict=True):
        first, second = a.pop("elbo")["policy"], b.pop("elbo")["policy"]
        # Their spread, which may be small, is as exact as they are and not as it is.
        exact = 1e-6 * max(map(abs, first["samples"]))
        for name in ("samples", "value", "stderr"):
            assert first.pop(name) == pytest.approx(second.pop(name), abs=exact)
        assert first == second
        assert a == b


def test_a_batch_of_one_gives_the_bytes_of_a_single_run(tmp_path, saved_models, sampled):
    assert_equal_in_parts(
        tmp_path, "score-elbo", "-m", saved_models("llada"), "-k", "2", "-b", "1", sampled, count=2
    )


def test_more_shards_than_groups_are_empty_and_no_error(tmp_path, saved_models, sampled, prompts):
    made = assert_equal_in_parts(tmp_path, "verify", "--weight", "countdown=2", sampled, count=20)
    assert sorted(part.count(b"\n") for part in made) == [0] * 14 + [3] * 6
    made = assert_equal_in_parts(tmp_path, "prompts", "sudoku", "-n", "2", count=5)
    assert made.count(b"") == 3
    line = ("rollout", "-m", saved_models("llada"), *SMALL, prompts, "--shard", "10/10")
    empty = invoke(*line[:-1], "10/20")
    assert empty.exit_code == 0
    assert "no prompts are in shard 10/20" in empty.stderr


def test_a_weight_of_what_is_in_another_shard_is_no_error(tmp_path, sampled):
    rows = read_jsonl(sampled)
    for row in rows[:9]:
        row.update(task="exact", answer="1")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    assert_equal_in_parts(tmp_path, "verify", "--weight", "exact=3", mixed)
    unknown = invoke("verify", "--weight", "exatc=3", "--shard", "1/2", str(mixed))
    assert unknown.exit_code == 2
    assert "no verifier 'exatc'" in unknown.stderr


def refused(*line: str | Path) -> Result:
    result = invoke(*map(str, line))
    assert result.exit_code == 2, result.output
    return result


def test_what_cannot_be_cut_is_refused(tmp_path, prompts):
    for name in ("prompts", "rollout", "verify", "score-elbo", "advantage"):
        assert "count from 1" in refused(name, "--shard", "0/8", prompts).stderr
        assert "give a FILE" in refused(name, "--shard", "1/8", "-").stderr
    assert "say how many with -n" in refused("prompts", "-n", "0", "--shard", "1/2").stderr
    assert (
        "whole input" in refused("advantage", "--scale", "batch", "--shard", "1/2", prompts).stderr
    )
    follow = refused("rollout", "--follow", tmp_path, "--shard", "1/2", prompts)
    assert "--shard and --follow" in follow.stderr
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    for name in ("prompts", "rollout", "verify", "score-elbo", "advantage"):
        assert "regular FILE" in refused(name, "--shard", "1/8", pipe).stderr


EXAMPLE = Path(__file__).parents[2] / "examples/cluster"


def test_the_example_makes_what_is_missing_and_compares_it_with_a_single_run(tmp_path):
    options = "N=2 PROMPTS=3 SAMPLE='-n 2 --steps 4'"
    make = f"make -s -f {EXAMPLE}/Makefile RUNS=. {options}"
    done = shell(f"{make} check", tmp_path)
    assert done.returncode == 0, done.stderr
    train = (tmp_path / "train.jsonl").read_bytes()
    assert train.count(b"\n") == 6
    # What a worker that was killed leaves: a file that is not whole, and none that is made of it.
    samples, verified = (tmp_path / f"{name}.2-of-2.jsonl" for name in ("samples", "verified"))
    begun = samples.read_bytes()
    Path(f"{samples}.partial").write_bytes(begun[: len(begun) // 2])
    samples.unlink()
    verified.unlink()
    (tmp_path / "train.jsonl").unlink()
    again = shell(f"{make} check", tmp_path)
    assert again.returncode == 0, again.stderr
    assert "records of samples.2-of-2.jsonl.partial" in again.stderr
    assert "1-of-2" not in again.stderr
    assert samples.read_bytes() == begun
    assert (tmp_path / "train.jsonl").read_bytes() == train


def test_the_tasks_of_a_slurm_array_are_the_parts(tmp_path):
    task = f"bash {EXAMPLE}/rollout.sbatch"
    environment = "RUNS=. SAMPLES=1 SLURM_ARRAY_TASK_ID"
    done = shell(
        f"dlmctl prompts sudoku -n 3 -o prompts.jsonl && "
        f"{environment}=1 SLURM_ARRAY_TASK_COUNT=2 {task} && "
        f"{environment}=2 SLURM_ARRAY_TASK_COUNT=1 SHARDS=2 {task} && "
        f"RUNS=. SHARDS=2 bash {EXAMPLE}/train.sbatch",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    ids = [row["id"] for row in read_jsonl(tmp_path / "train.jsonl")]
    assert ids == [row["id"] for row in read_jsonl(tmp_path / "prompts.jsonl")]
    assert (tmp_path / "model/latest/model.safetensors").exists()
