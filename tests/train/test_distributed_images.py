"""Teachers and students of images under torchrun: the steps, and the files, are those of one
process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from conftest import invoke, read_jsonl, wait_for
from ranks import Ranks, same_files, same_metrics

from dlmctl.records.locks import hold_run

NOTHING = Path(os.devnull)
SMALL = "--network mlp --width 8 --checkpoints 2 --first-checkpoint 4 -q"
TEACHER = f"distill teacher builtin:digits#0:16 {SMALL} --steps 8 --log-every 2"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    assert invoke(*f"{TEACHER} -b 6 -o {run}".split()).exit_code == 0
    return run


def closed() -> int:
    """Standard output whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def same_runs(one: Path, other: Path) -> None:
    same_metrics(read_jsonl(one / "metrics.jsonl"), read_jsonl(other / "metrics.jsonl"))
    names = {path.name for path in one.iterdir()} - {".lock"}
    assert names == {path.name for path in other.iterdir()} - {".lock"}
    for name in names - {"metrics.jsonl", "latest"}:
        same_files(one / name, other / name)
    assert os.readlink(one / "latest") == os.readlink(other / "latest")


@pytest.mark.parametrize(
    "options",
    [
        f"{TEACHER} -b 5",
        "distill teacher builtin:digits#0:9 --network unet --width 4 --multipliers 1,2 --blocks 1 "
        "--attention 2 --steps 2 -b 3 --ema 0 -q",
        "distill teacher builtin:digits#0:9 --network unet --width 4 --multipliers 1,2 --blocks 1 "
        "--steps 2 -b 3 --dropout 0.3 --flip -q",
        # A single image: one of the ranks has nothing to do but must take part.
        f"distill cd builtin:digits#0:16 --objective ect --init scratch {SMALL} --steps 4 -b 1",
    ],
)
def test_two_ranks_are_as_one(tmp_path: Path, options: str) -> None:
    alone = invoke(*options.split(), "-o", str(tmp_path / "one"))
    assert alone.exit_code == 0, alone.output
    made = Ranks(f"{options} -o two", tmp_path, NOTHING).done()
    same_metrics(read_jsonl(tmp_path / "one" / "metrics.jsonl"), made)
    same_runs(tmp_path / "one", tmp_path / "two")


def test_a_student_that_was_stopped_goes_on_at_another_number_of_ranks(
    tmp_path: Path, teacher: Path
) -> None:
    line = (
        f"distill cd builtin:digits#0:16 --teacher {teacher} --scales 6 -b 5 --steps 8 "
        "--checkpoints 2 --first-checkpoint 4 --log-every 3 --save-minutes 0 -q"
    )
    alone = invoke(*line.split(), "-o", str(tmp_path / "one"))
    assert alone.exit_code == 0, alone.output
    for name, before, after in (("two-one", 2, 1), ("one-three", 1, 3)):
        output = closed()
        stopped = Ranks(f"{line} -o {name}", tmp_path, NOTHING, before, output)
        os.close(output)
        assert [command.wait() for command in stopped.commands] == [0] * before
        # Step 3 is the first that is told of, and its reader is gone.
        assert os.readlink(tmp_path / name / "state" / "latest") == "step-000002"
        Ranks(f"{line} -o {name}", tmp_path, NOTHING, after).done()
        same_runs(tmp_path / "one", tmp_path / name)
    done = Ranks(f"{line} -o one-three", tmp_path, NOTHING)
    assert [command.wait() for command in done.commands] == [0, 0]
    assert done.err[0].read_text().count("is trained already") == 1
    assert not done.err[1].read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks_and_the_first_says_where_it_stands(
    tmp_path: Path, number: signal.Signals
) -> None:
    line = f"distill teacher builtin:digits#0:16 {SMALL} --steps 1000000 --log-every 1 -o run"
    ranks = Ranks(line, tmp_path, NOTHING)
    log = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
    for command in ranks.commands:
        command.send_signal(number)
    assert [command.wait() for command in ranks.commands] == [-number, -number]
    assert "interrupted: run was at step" in ranks.err[0].read_text()
    assert not ranks.err[1].read_text()


def test_a_rank_that_sees_other_images_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dlmctl.distill.image_training.broadcast", lambda _: "of the first")
    refused = invoke(*f"{TEACHER} -b 6 -o {tmp_path}/run".split())
    assert refused.exit_code == 2
    assert "sees other images" in refused.output


def test_what_the_first_rank_refuses_ends_all_of_them(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = hold_run(tmp_path / "run")
    ranks = Ranks(f"{TEACHER} -b 6 -o run", tmp_path, NOTHING)
    assert ranks.commands[0].wait() == 75
    ranks.commands[1].send_signal(signal.SIGTERM)  # as torchrun does
    assert ranks.commands[1].wait() == -signal.SIGTERM
    assert f"process {os.getpid()} is writing run" in ranks.err[0].read_text()
    assert not ranks.err[1].read_text()
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    lock.release()
