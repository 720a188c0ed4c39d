"""Lines become records with a place; what is wrong is said with it; what was written stays."""

import io
import os
import resource
import stat
from pathlib import Path

import pytest
from conftest import read_jsonl

from dlmctl.records.errors import (
    CannotCreateError,
    CannotWriteError,
    DataError,
    MissingInputError,
)
from dlmctl.records.jsonl import Record, dump, each, field, read_records, write_records


def test_records_know_where_they_stand_and_blank_lines_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n  \n{"n": 2}')
    (tmp_path / "b.jsonl").write_text('{"n": 3}\r\n')
    a, b = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    records = list(read_records([a, b]))
    assert [r["n"] for r in records] == [1, 2, 3]
    assert [r.where for r in records] == [f"{a}:1", f"{a}:4", f"{b}:1"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1', "not JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"3", "found int"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": "\xff"}', "not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named_with_its_file_and_number(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"id": 1}\n' + line + b'\n{"id": 3}\n')
    stream = read_records([str(path)])
    assert next(stream)["id"] == 1
    with pytest.raises(DataError, match=message) as caught:
        next(stream)
    assert str(caught.value).startswith(f"{path}:2: ")
    kept = list(read_records([str(path)], "keep"))
    assert [r.get("id") for r in kept] == [1, None, 3]
    assert kept[1]["error"]["where"] == f"{path}:2"
    assert kept[1]["line"] == line.decode("utf-8", "replace")


def test_skipping_says_what_was_skipped(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"id": 1}\nno\n')
    assert len(list(read_records([str(path)], "skip"))) == 1
    assert f"skipped: {path}:2: not JSON" in capsys.readouterr().err


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(MissingInputError, match="cannot read nothing"):
        list(read_records(["nothing.jsonl"]))
    with pytest.raises(MissingInputError, match="Is a directory"):
        list(read_records([str(tmp_path)]))


def test_reading_is_lazy():
    class Endless(io.RawIOBase):
        read_lines = 0

        def __iter__(self):
            return self

        def __next__(self):
            self.read_lines += 1
            return b'{"n": 1}\n'

    source = Endless()
    records = (Record(n=1) for _ in source)
    stream = each(records, lambda r: Record(r, seen=True))
    assert next(stream)["seen"]
    assert source.read_lines == 1


def test_records_that_bear_an_error_pass_untouched():
    def refuse(record):
        raise DataError("no")

    marked = Record(error={"message": "earlier"})
    assert list(each([marked], refuse)) == [marked]


def test_what_a_stage_cannot_use_is_kept_with_the_reason():
    def refuse(record):
        raise DataError("too odd")

    record = Record(id="a")
    record.where = "f:7"
    [kept] = each([record], refuse, "keep")
    assert kept == {"id": "a", "error": {"where": "f:7", "message": "too odd"}}
    with pytest.raises(DataError, match=r"^f:7: too odd$"):
        list(each([record], refuse))


def test_fields_are_checked_for_their_type():
    record = Record(n=1, flag=True, text="x")
    assert field(record, "n", int) == 1
    with pytest.raises(DataError, match="field 'flag' is bool, expected int"):
        field(record, "flag", int)
    with pytest.raises(DataError, match="field 'm' is missing, expected int or str; look"):
        field(record, "m", (int, str), "look elsewhere")


def test_a_file_takes_its_name_only_when_it_is_whole(tmp_path, capsys):
    target = tmp_path / "deep" / "out.jsonl"

    def records():
        yield {"n": 1}
        assert not target.exists()
        yield {"n": 2}

    assert write_records(records(), str(target)) == 2
    assert read_jsonl(target) == [{"n": 1}, {"n": 2}]
    assert [p.name for p in target.parent.iterdir()] == ["out.jsonl"]


def test_after_a_failure_the_old_file_is_whole_and_the_new_records_are_kept(tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    target.write_text('{"old": 1}\n')

    def records():
        yield {"n": 1}
        raise DataError("bad", "f:2")

    with pytest.raises(DataError):
        write_records(records(), str(target))
    assert read_jsonl(target) == [{"old": 1}]
    assert read_jsonl(tmp_path / "out.jsonl.partial") == [{"n": 1}]
    assert "out.jsonl.partial" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_named():
    with pytest.raises(CannotCreateError, match="cannot create /proc/no/file"):
        write_records([{}], "/proc/no/file")


def test_a_disk_that_fills_up_is_said_with_what_was_written(monkeypatch):
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr("sys.stdout", type("Out", (), {"buffer": full}))
        with pytest.raises(CannotWriteError, match=r"standard output .*No space.* 0 records"):
            write_records([{"n": 1}])


def test_a_file_that_cannot_grow_is_said_and_its_whole_lines_stay(tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12, before[1]))
    try:
        with pytest.raises(CannotWriteError, match=r"out\.jsonl \(File too large\); 1 records"):
            write_records([{"n": 1}, {"n": 2}], str(target))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "out.jsonl.partial").read_bytes().splitlines(keepends=True)[0] == (
        b'{"n":1}\n'
    )
    assert not target.exists()


def test_what_is_said_when_a_file_is_closed_is_no_success(tmp_path, monkeypatch):
    class Remote(io.FileIO):
        def close(self):
            super().close()
            raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(Path, "open", lambda path, mode: Remote(path, mode))
    with pytest.raises(CannotWriteError, match="quota"):
        write_records([{"n": 1}], str(tmp_path / "out.jsonl"))
    assert not (tmp_path / "out.jsonl").exists()


def test_numbers_of_numpy_are_written_as_numbers():
    import numpy

    assert dump({"a": numpy.float64(0.5), "b": numpy.arange(2)}) == b'{"a":0.5,"b":[0,1]}\n'


def test_what_is_no_file_is_written_as_it_is(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert write_records([{"n": 1}, {"n": 2}], str(pipe)) == 2
    assert os.read(reader, 100) == b'{"n":1}\n{"n":2}\n'
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]
    with pytest.raises(CannotCreateError, match="directory"):
        write_records([{"n": 1}], str(tmp_path))


def test_what_json_has_no_form_for_is_named_with_its_place():
    record = Record(n=1, blob=b"x")
    record.where = "t.parquet:3"
    with pytest.raises(DataError, match=r"t\.parquet:3: it cannot be written as JSON .*bytes"):
        dump(record)
