"""A record chooses among verifiers that are installed, not what is imported."""

import sys

import pytest

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.verify import Judging
from dlmctl.verifiers.registry import find_verifier, verify


@pytest.mark.parametrize("task", ["touched:x", "os:getcwd", ":", ".x:y", "builtins:print", "a\0:b"])
@pytest.mark.parametrize("time_limit", [0.5, 5.0])
def test_a_task_that_names_a_function_is_no_task(tmp_path, monkeypatch, task, time_limit):
    (tmp_path / "touched.py").write_text("x = len\n")
    monkeypatch.syspath_prepend(tmp_path)
    records = [Record(task=task, completion="x")]
    with pytest.raises(DataError, match="no verifier for task"):
        list(verify(records, judging=Judging(time_limit=time_limit)))
    assert "touched" not in sys.modules


@pytest.mark.parametrize("name", [":x", ".x:y", "a\0b:c", "1" + ".1" * 1000 + ":x", "os:nothing"])
def test_a_name_that_is_none_is_said_to_be_none(name):
    with pytest.raises(UsageError, match="cannot be loaded"):
        find_verifier(name)
