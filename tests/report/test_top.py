"""Runs followed on a terminal: the curves, and what is said of a run."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from conftest import invoke
from preloaded import HANGS

from dlmctl.records.locks import hold_run
from dlmctl.report.text_curves import drawn, spread
from dlmctl.report.watched_run import WatchedRun


def write(run: Path, steps: range, **more: object) -> None:
    run.mkdir(exist_ok=True)
    with (run / "metrics.jsonl").open("a") as stream:
        for step in steps:
            record = {"step": step, "reward": step / 8, "tokens_per_second": 3.0, **more}
            stream.write(json.dumps(record) + "\n")


def test_a_column_has_the_mean_of_its_points_and_others_lie_between() -> None:
    points = [(0.0, 1.0), (1.0, 3.0), (20.0, 5.0), (39.0, 4.0), (40.0, float("nan"))]
    assert spread(points, 0.0, 40.0, 5) == [2.0, 3.5, 5.0, 4.5, 4.0]
    assert spread([(10.0, 7.0)], 0.0, 40.0, 5) == [None, 7.0, None, None, None]


def test_a_straight_line_is_a_diagonal_of_dots() -> None:
    picture = drawn([[(0, 0), (1, 1)]], 4, 2)
    assert ["".join(text for text, _ in row) for row in picture] == ["⠀⠀⡠⠊", "⡠⠊⠀⠀"]
    plain = drawn([[(0, 0), (1, 1)]], 3, 3, braille=False)
    assert ["".join(text for text, _ in row) for row in plain] == ["  *", " * ", "*  "]


def test_series_share_their_axes_and_have_their_numbers() -> None:
    picture = drawn([[(0, 0), (9, 0)], [(0, 1), (9, 1)]], 5, 2, braille=False)
    assert [[number for _, number in row] for row in picture] == [[1] * 5, [0] * 5]


def test_a_run_says_where_it_is(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write(run, range(1, 11), algo="rspo")
    (run / "step-000005").mkdir()
    (run / "latest").symlink_to("step-000005")
    now = time.time()
    os.utime(run / "step-000005", (now - 110, now - 110))
    os.utime(run / "metrics.jsonl", (now - 10, now - 10))
    watched = WatchedRun(run, [], 40)
    assert watched.rate == pytest.approx(5 / 100)
    assert (watched.kind, watched.step, watched.owner) == ("rspo", 10, None)
    assert watched.place() == "step 10 of 40 (25 %), 3.0/min, checkpoint step-000005 1 min 50 s ago"
    assert watched.state() == "no process trains; last record 10 s ago"
    lock = hold_run(run)
    watched.look()
    assert f"running, process {os.getpid()}" in watched.state()
    assert "10 min left" in watched.place()
    lock.release()


def test_the_rate_is_that_of_the_steps_seen(tmp_path: Path) -> None:
    run, now = tmp_path / "a", time.time()
    write(run, range(1, 11))
    os.utime(run / "metrics.jsonl", (now - 40, now - 40))
    watched = WatchedRun(run, [], None)
    assert watched.rate is None
    write(run, range(11, 15))
    os.utime(run / "metrics.jsonl", (now - 20, now - 20))
    watched.look()
    assert watched.rate == pytest.approx(4 / 20)


def test_steps_that_a_resumed_run_takes_again_replace_the_former(tmp_path: Path) -> None:
    run = tmp_path / "a"
    write(run, range(1, 9))
    watched = WatchedRun(run, [], None)
    (run / "metrics.jsonl").write_text("")
    write(run, range(1, 6))
    write(run, range(6, 12), reward=0.5)
    watched.look()
    assert watched.series["reward"][""] == [
        *((step, step / 8) for step in range(1, 6)),
        *((step, 0.5) for step in range(6, 12)),
    ]


def test_autoencoders_are_lines_and_their_state_tells_the_steps(tmp_path: Path) -> None:
    run = tmp_path / "saes"
    state = run / "state/block-000004"
    state.mkdir(parents=True)
    (state / "run.json").write_text('{"settings": {"tokens": 6400, "batch_size": 64}}')
    (run / "state/latest").symlink_to("block-000004")
    for layer in (0, 3):
        write(run, range(10, 31, 10), layer=layer, k=4, positions="mask", fve=layer / 4)
    done = invoke("top", run, "--once", "-y", "fve")
    assert done.exit_code == 0, done.output
    assert "sparse autoencoders" in done.stdout
    assert "step 30 of 100 (30 %)" in done.stdout
    assert "layer=0,k=4,positions=mask  layer=3,k=4,positions=mask" in done.stdout
    assert "fve 0, 0.75" in done.stdout


def test_evaluations_are_drawn_and_are_no_steps(tmp_path: Path) -> None:
    run = tmp_path / "a"
    for step in range(1, 4):
        write(run, range(step, step + 1), algo="sft")
        with (run / "metrics.jsonl").open("a") as stream:
            row = {"algo": "sft", "step": step, "eval": {"reward": step / 4, "prompts": 3}}
            stream.write(json.dumps(row) + "\n")
    watched = WatchedRun(run, [], None)
    assert watched.series["reward"][""] == [(1, 1 / 8), (2, 2 / 8), (3, 3 / 8)]
    assert watched.series["eval/reward"]["eval"] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert next(iter(watched.series)) == "eval/reward"
    assert watched.kind == "sft"
    assert watched.step == 3
    done = invoke("top", run, "--once")
    assert "eval/reward 0.75" in done.stdout
    assert "step 3" in done.stdout


def test_in_a_pipe_a_screen_is_text(tmp_path: Path) -> None:
    write(tmp_path / "a", range(1, 5))
    done = invoke("top", tmp_path / "a")
    assert done.exit_code == 0
    assert "reward 0.5" in done.stdout
    assert "\x1b" not in done.stdout
    assert "tokens_per_second" not in done.stdout


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = invoke("top", tmp_path / "empty")
    assert (done.exit_code, "it is not a run" in done.stderr) == (66, True)
    assert invoke("top", tmp_path / "none").exit_code == 66


def test_on_a_terminal_it_follows_until_ctrl_c(tmp_path: Path) -> None:
    write(tmp_path / "a", range(1, 5))
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "dlmctl", "top", "a", "--every", "0.1"]
    environment = {
        **{n: v for n, v in os.environ.items() if n not in ("COLUMNS", "LINES", "NO_COLOR")},
        "TERM": "xterm",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=tmp_path, env=environment
    ) as process:
        os.close(slave)
        seen = read_until(master, b"", b"step 4")
        write(tmp_path / "a", range(5, 8))
        seen = read_until(master, seen, b"step 7")
        process.send_signal(signal.SIGINT)
        seen = read_until(master, seen, b"interrupted")
        assert process.wait(60) == -signal.SIGINT
    # The screen and the cursor are as they were.
    assert seen.rindex(b"\x1b[?1049l") > seen.rindex(b"\x1b[?1049h")
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")


def read_until(descriptor: int, seen: bytes, wanted: bytes) -> bytes:
    """What a terminal shows, until it shows this."""
    deadline = time.monotonic() + HANGS
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([descriptor], [], [], 1)[0]:
            seen += os.read(descriptor, 4096)
    return seen
