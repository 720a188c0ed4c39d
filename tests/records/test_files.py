"""Directories and links are there whole or not at all."""

import os
from pathlib import Path

import pytest

from dlmctl.records.errors import CannotCreateError
from dlmctl.records.files import (
    make_directory,
    publish_directory,
    publish_file,
    publish_link,
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

    with pytest.raises(OSError, match="No space"):
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
