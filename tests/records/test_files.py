"""Directories and links are there whole or not at all."""

import os
import resource
import subprocess
from pathlib import Path

import pytest

from dlmctl.records.errors import CannotCreateError, CannotWriteError
from dlmctl.records.files import (
    append_line,
    make_directory,
    publish_directory,
    publish_file,
    publish_link,
    remove_directory,
    write_file,
)


def test_a_directory_appears_when_it_is_whole(tmp_path):
    target = tmp_path / "step-1"

    def fill(beside):
        assert not target.exists()
        (beside / "weights").write_text("w")

    publish_directory(target, fill)
    assert (target / "weights").read_text() == "w"
    assert os.listdir(tmp_path) == ["step-1"]


def test_a_directory_whose_making_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    target = tmp_path / "step-1"
    publish_directory(target, lambda d: (d / "weights").write_text("old"))

    def fill(beside):
        (beside / "weights").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(CannotWriteError, match=r"cannot write .*step-1 \(No space"):
        publish_directory(target, fill)
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["step-1"]
    publish_directory(target, lambda d: (d / "other").write_text("new"))
    assert os.listdir(target) == ["other"]


def test_a_link_changes_its_target_in_one_step(tmp_path):
    link = tmp_path / "latest"
    (tmp_path / ".latest.partial-1").write_text("left by a process that was killed")
    for name in ("step-1", "step-2"):
        publish_link(link, name)
        assert os.readlink(link) == name
    assert sorted(os.listdir(tmp_path)) == [".latest.partial-1", "latest"]


def test_places_that_cannot_be_written_are_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for make in (
        lambda: make_directory(file / "below"),
        lambda: publish_directory(file / "below" / "x", lambda d: None),
        lambda: write_file(file / "below", b""),
    ):
        with pytest.raises(CannotCreateError, match=str(file)):
            make()


def test_a_whole_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a" / "plot.svg"
    write_file(path, b"1")
    write_file(path, b"2")
    assert path.read_bytes() == b"2"
    assert os.listdir(path.parent) == ["plot.svg"]


def test_a_file_whose_writing_fails_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "plot.svg"
    write_file(path, b"old")
    whole = Path.write_bytes

    def full(beside, data):
        whole(beside, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for attempt in (
        lambda: write_file(path, b"new"),
        lambda: publish_file(path, lambda beside: beside.write_bytes(b"new")),
    ):
        with pytest.raises(CannotCreateError, match="No space left"):
            attempt()
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["plot.svg"]


def test_a_file_whose_writing_is_interrupted_leaves_nothing(tmp_path):
    def write(beside):
        beside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_file(tmp_path / "plot.svg", write)
    assert os.listdir(tmp_path) == []


def test_what_the_dead_left_of_a_target_goes_and_what_the_living_make_stays(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    # In a container a process often has the number of the one before.
    for number in (dead.pid, os.getpid()):
        (tmp_path / f".a.partial-{number}").mkdir()
        (tmp_path / f".b.partial-{number}").write_text("half")
    kept = {f".a.partial-{os.getppid()}", f".b.partial-{os.getppid()}", f".c.partial-{dead.pid}"}
    for name in kept:
        (tmp_path / name).write_text("of another")
    publish_directory(tmp_path / "a", lambda beside: None)
    write_file(tmp_path / "b", b"whole")
    assert set(os.listdir(tmp_path)) == {"a", "b"} | kept


def test_a_directory_that_is_removed_is_never_there_in_part(tmp_path, monkeypatch):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "weights").write_text("w")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as if killed
    remove_directory(tmp_path / "state")
    assert os.listdir(tmp_path) == [f".state.partial-{os.getpid()}-old"]
    remove_directory(tmp_path / "not there")


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
    log = tmp_path / "metrics.jsonl"
    append_line(log, b"first\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9, before[1]))
    try:
        with pytest.raises(CannotWriteError, match=r"metrics\.jsonl"):
            append_line(log, b"second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.read_bytes() == b"first\n"
    append_line(log, b"second\n")
    assert log.read_bytes() == b"first\nsecond\n"
    with pytest.raises(CannotCreateError):
        append_line(tmp_path, b"a directory")
