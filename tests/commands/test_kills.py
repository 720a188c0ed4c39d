"""Killing any stage of a training loop at any moment loses nothing that was published."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import orjson
import pytest
from conftest import read_jsonl, wait_for
from preload import parent
from preloaded import Command

from dlmctl.models.loading import load_policy
from dlmctl.records.errors import DataError
from dlmctl.train.run_directory import Progress, latest_checkpoint, read_progress

KILLS = int(os.environ.get("DLMCTL_TEST_KILLS", "4"))


def start_loop(run: Path, model: str, rounds: int) -> list[Command]:
    """rollout | verify | update, each a process of ours; what they say is in RUN.err."""
    lines = [
        f"rollout -q --follow {run} -m {model} --rounds {rounds} --task countdown --prompts 2 -n 4 "
        "--gen-length 4 --block-length 4 --steps 2",
        "verify -q --verifier checks:place",
        f"update -q --lr 1e-3 --prompts-per-step 1 --inner 2 -o {run}",
    ]
    errors = os.open(f"{run}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    source = os.open(os.devnull, os.O_RDONLY)
    stages: list[Command] = []
    for line in lines:
        last = line is lines[-1]
        following, output = (-1, os.open(os.devnull, os.O_WRONLY)) if last else os.pipe()
        stages.append(Command(parent(), line.split(), [source, output, errors], run.parent))
        # Ours are closed, so that the end of a stage is seen by those beside it.
        os.close(source)
        os.close(output)
        source = following
    os.close(errors)
    return stages


def progress_of(run):
    """Of the newest checkpoint; a loop that runs may remove it before it is read."""
    while checkpoint := latest_checkpoint(run):
        with contextlib.suppress(DataError):
            return read_progress(checkpoint)
    return Progress("", "", "")


def test_killed_at_random_moments_a_loop_goes_on_at_the_next_round(tmp_path, saved_models):
    (tmp_path / "checks.py").write_text("def place(record): return record['sample'] % 2")
    run, model, dice = tmp_path / "run", saved_models("llada"), random.Random(0)
    rounds, stage_names = 0, ("rollout", "verify", "update")
    for kill in range(KILLS):
        stages = start_loop(run, model, 100_000)
        # From the first new round on, as before it there is nothing to lose.
        wait_for(lambda at=rounds: progress_of(run).round > at, Path(f"{run}.err").read_text)
        time.sleep(dice.random() * 0.3)
        victim = kill % 3
        stages[victim].send_signal(dice.choice([signal.SIGKILL, signal.SIGTERM]))
        for name, stage in zip(stage_names, stages, strict=True):
            try:
                stage.wait()
            except TimeoutError:
                pytest.fail(f"{name} goes on though {stage_names[victim]} was killed")

        # The newest checkpoint is whole, and every round of it was trained on once.
        done = progress_of(run)
        assert done.round > rounds
        assert done.step == 4 * done.round
        load_policy(str(run), "cpu")
        rounds = done.round

    stages = start_loop(run, model, rounds + 1)
    assert [stage.wait() for stage in stages] == [0, 0, 0]
    history = [orjson.loads(line) for line in (run / "metrics.jsonl").read_bytes().splitlines()]
    assert [m["step"] for m in history] == list(range(1, 4 * (rounds + 1) + 1))
    assert [m["round"] for m in history if "round" in m] == sorted(2 * list(range(rounds + 1)))
    assert not list(run.glob(".*partial*"))
    assert read_jsonl(run / "metrics.jsonl")[-1]["step"] == progress_of(run).step
