"""One process at a time trains in a directory, and a dead one keeps nobody out."""

import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys

import pytest
from conftest import HANGS, invoke, shell, wait_for
from preload import parent
from preloaded import Command

from dlmctl.records.errors import TryAgainError
from dlmctl.records.files import write_file
from dlmctl.records.jsonl import write_records
from dlmctl.records.locks import hold, hold_run

OWNER = """
import os, sys, time
from pathlib import Path
from dlmctl.records.locks import hold, hold_run
lock = hold_run(Path(sys.argv[1])) if sys.argv[2] == "run" else hold(Path(sys.argv[1]), "it")
if sys.argv[3] == "fork":
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.write(writes, b"x")
        time.sleep(3600)
    os.read(reads, 1)  # until the child has run what it runs first, on a busy machine too
if sys.argv[3] == "exec":
    import subprocess
    subprocess.Popen(["sleep", "3600"])
print("held", flush=True)
sys.stdin.read()
"""


def owner(path, kind="run", child="none"):
    """A process that holds a lock."""
    line = [sys.executable, "-c", OWNER, str(path), kind, child]
    # In a session of its own, so that its children can be ended with it.
    process = subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"held\n"
    return process


@pytest.mark.parametrize("child", ["none", "fork", "exec"])
def test_a_lock_ends_with_its_owner_whatever_its_children_do(tmp_path, child):
    process = owner(tmp_path, child=child)
    group = os.getpgid(process.pid)
    try:
        with pytest.raises(TryAgainError, match=f"process {process.pid} is writing"):
            hold_run(tmp_path)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert hold_run(tmp_path) is not None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        process.wait()


def test_the_owner_is_named_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr("dlmctl.records.locks._owner", lambda inode: None)
    process = owner(tmp_path)
    try:
        with pytest.raises(TryAgainError, match=f"process {process.pid} is writing"):
            hold_run(tmp_path)
    finally:
        process.kill()
        process.wait()


def test_a_lock_is_one_for_a_process_and_gone_with_its_last_holder(tmp_path):
    first, second = hold_run(tmp_path), hold_run(tmp_path)
    assert os.listdir(tmp_path) == [".lock"]
    del first
    gc.collect()
    other = [sys.executable, "-c", OWNER, str(tmp_path), "run", "none"]
    refused = subprocess.run(other, capture_output=True, text=True, timeout=HANGS)
    assert f"process {os.getpid()} is writing" in refused.stderr
    del second
    gc.collect()
    assert os.listdir(tmp_path) == []


def test_a_file_that_took_another_name_meanwhile_is_not_the_one_that_is_locked(tmp_path):
    partial, output = tmp_path / "out.partial", tmp_path / "out"
    partial.write_text("done")
    first = hold(partial, "out")
    os.replace(partial, output)
    second = hold(partial, "out")  # of a new file
    assert second is not first
    assert output.read_text() == "done"
    first.release()
    second.release()


def test_a_second_trainer_is_refused_and_the_directory_left_as_it_is(tmp_path, saved_models):
    (tmp_path / "run").mkdir()
    (tmp_path / "records.jsonl").write_text("not read\n")
    teacher = "distill teacher builtin:digits#0:8 --network mlp --width 8 -b 4 --steps 2"
    lines = [
        f"update -m {saved_models('llada')} -o run records.jsonl",
        f"sae-train records.jsonl -m {saved_models('llada')} --latents 8 -k 2 -o run",
        f"distill masked records.jsonl --teacher {saved_models('llada')} -o run",
        teacher + " -o run",
        "distill cd builtin:digits#0:8 --objective ect --init scratch --network mlp --width 8 "
        "-b 4 --steps 2 -o run",
    ]
    process = owner(tmp_path / "run")
    try:
        for line in lines:
            done = shell(f"dlmctl {line}", tmp_path)
            assert done.returncode == 75, done.stderr
            assert f"process {process.pid} is writing run" in done.stderr
            assert os.listdir(tmp_path / "run") == [".lock"]
    finally:
        process.kill()
        process.wait()
    done = shell(f"dlmctl {teacher} -o run", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ".lock" not in os.listdir(tmp_path / "run")


def test_readers_do_not_wait_for_a_trainer(tmp_path):
    write_file(tmp_path / "run" / "metrics.jsonl", b'{"step":1,"loss":2.0}\n')
    process = owner(tmp_path / "run")
    try:
        done = shell("dlmctl plot -o loss.svg -y loss run/metrics.jsonl", tmp_path)
        assert done.returncode == 0, done.stderr
    finally:
        process.kill()
        process.wait()


def test_a_second_writer_of_a_file_is_refused(tmp_path):
    output = tmp_path / "out.jsonl"
    process = owner(f"{output}.partial", kind="file")
    try:
        with pytest.raises(TryAgainError, match=f"process {process.pid} is writing .*out.jsonl"):
            write_records([{"n": 1}], str(output))
        assert not output.exists()
    finally:
        process.kill()
        process.wait()
    assert write_records([{"n": 2}], str(output)) == 1
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_second_command_does_not_cut_what_the_first_has_written(tmp_path):
    record = b'{"id":"a","task":"countdown","numbers":[1,2],"target":3,"completion":"1+2"}\n'
    source, end = os.pipe()
    null = os.open(os.devnull, os.O_RDWR)
    first = Command(parent(), ["verify", "-o", "out.jsonl"], [source, null, null], tmp_path)
    os.close(source)
    os.close(null)
    os.write(end, record)
    partial = tmp_path / "out.jsonl.partial"
    wait_for(lambda: partial.exists() and partial.stat().st_size)
    (tmp_path / "in.jsonl").write_bytes(2 * record)
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        refused = invoke("verify", "-o", "out.jsonl", "in.jsonl")
    finally:
        os.chdir(before)
    assert refused.exit_code == 75
    assert f"process {first.pid} is writing out.jsonl" in refused.stderr
    os.close(end)
    assert first.wait() == 0
    assert (tmp_path / "out.jsonl").read_bytes().count(b"\n") == 1


def test_a_file_system_without_locks_is_written_with_a_word_about_it(tmp_path, monkeypatch, capsys):
    def none(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    assert write_records([{"n": 1}], str(tmp_path / "out")) == 1
    assert "no lock on" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]
