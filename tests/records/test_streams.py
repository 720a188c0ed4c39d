"""Streams between processes: endless input, readers that leave, files that grow."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import HANGS, read_jsonl, shell

LINE = '{"id":"a","task":"countdown","numbers":[1,2],"target":3,"completion":"1+2"}'
ENDLESS = f"yes '{LINE}'"


def test_endless_input_ends_with_its_reader_silently_and_with_exit_0(tmp_path):
    done = shell(
        f"{ENDLESS} | dlmctl verify | head -3 > three.jsonl; echo ${{PIPESTATUS[@]}}",
        tmp_path,
    )
    assert done.stdout.split()[1:] == ["0", "0"]
    assert done.stderr == ""
    assert [r["reward"] for r in read_jsonl(tmp_path / "three.jsonl")] == [1.0] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/PID/status")
def test_memory_stays_flat_under_endless_input():
    source = subprocess.Popen(["yes", LINE], stdout=subprocess.PIPE)
    stage = subprocess.Popen(
        [sys.executable, "-m", "dlmctl", "verify"],
        stdin=source.stdout,
        stdout=subprocess.PIPE,
    )

    def resident():
        """Kilobytes."""
        status = Path(f"/proc/{stage.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status).group(1))

    try:
        for _ in range(2_000):
            stage.stdout.readline()
        early = resident()
        for _ in range(30_000):
            stage.stdout.readline()
        # 30000 records of 300 bytes and more would be 9 MB and more.
        assert resident() - early < 2_000
    finally:
        for process in (stage, source):
            process.kill()
            process.wait()


def test_a_record_leaves_before_the_next_one_comes():
    stage = subprocess.Popen(
        [sys.executable, "-m", "dlmctl", "verify"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    for _ in range(2):
        stage.stdin.write(LINE.encode() + b"\n")
        stage.stdin.flush()
        assert b'"reward":1.0' in stage.stdout.readline()
    stage.stdin.write(LINE.encode())  # no line end: the file of a writer that was cut off
    out, _ = stage.communicate(timeout=HANGS)
    assert b'"reward":1.0' in out
    assert stage.returncode == 0


def test_a_stage_that_waits_for_input_ends_when_its_reader_has_gone():
    stage = subprocess.Popen(
        [sys.executable, "-m", "dlmctl", "verify"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    stage.stdin.write(LINE.encode() + b"\n")
    stage.stdin.flush()
    stage.stdout.readline()
    stage.stdout.close()
    assert stage.wait(HANGS) == 0
    assert stage.stderr.read() == b""


@pytest.mark.parametrize("stage", ["verify", "advantage", "prompts sudoku", "stats"])
def test_a_full_disk_is_exit_74(tmp_path, stage):
    record = LINE.replace("}", ',"reward":1,"sample":0}')
    done = shell(f"echo '{record}' | dlmctl {stage} > /dev/full", tmp_path)
    assert done.returncode == 74, done.stderr
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr
