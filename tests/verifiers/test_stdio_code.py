"""Programs that read and print, judged by pairs of input and output."""

import base64
import json
import pickle
import zlib
from pathlib import Path

import pytest
from conftest import HANGS, wait_for
from test_code_verifier import left_behind, scratch, unconfined_harness  # noqa: F401

from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.records.jsonl import Record
from dlmctl.verifiers import sandbox
from dlmctl.verifiers.code import code
from dlmctl.verifiers.registry import verify
from dlmctl.verifiers.stdio import agrees, cases

SUM = "print(sum(map(int, input().split())))"
PAIRS = [("1 2\n", "3\n"), ("4 5", "9")]


def judge(completion, pairs=PAIRS, time_limit=HANGS, **options):
    tests = [{"input": given, "output": expected} for given, expected in pairs]
    return code({"completion": completion, "tests": tests}, time_limit=time_limit, **options)


@pytest.fixture(scope="module", autouse=True)
def confined():
    try:
        judge(SUM)
    except UnavailableError as error:
        pytest.skip(f"{error}")


def test_every_shape_of_record_gives_the_same_tests():
    pairs = [{"input": given, "output": expected} for given, expected in PAIRS]
    table = {"inputs": [given for given, _ in PAIRS], "outputs": [e for _, e in PAIRS]}
    lines = {"inputs": [["1 2", ""], ["4 5"]], "outputs": [["3", ""], ["9"]]}  # TACO, APPS
    typed = [{**pair, "testtype": "stdin"} for pair in pairs]
    for record in (
        {"tests": pairs},
        {"tests": json.dumps(pairs)},
        {"input_output": table},
        {"input_output": json.dumps(table)},
        {"input_output": lines},
        {"public_test_cases": json.dumps(typed[:1]), "private_test_cases": typed[1:]},
    ):
        assert cases(record) == PAIRS
    for record in ({}, {"tests": ["assert f()"]}, {"tests": "assert [] == []"}):
        assert cases(record) == []
    assert cases({"input_output": "", "test_list": ["assert f()"]}) == []


def test_records_are_judged_by_their_task():
    table = json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})
    rows = [
        Record(task=task, completion=f"```python\n{text}\n```", input_output=table)
        for task, text in (("apps", SUM), ("livecodebench", "print(4)"))
    ]
    assert [row["rewards"] for row in verify(rows)] == [{"code": 1}, {"code": 0}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_output": "{"}, "'input_output' is not JSON"),
        ({"input_output": {"inputs": ["1"], "outputs": []}}, "of equal lengths"),
        ({"input_output": {"inputs": [[1]], "outputs": ["1"]}}, "neither text nor a list of lines"),
        ({"input_output": {"fn_name": "f", "inputs": [], "outputs": []}}, "fn_name"),
        ({"tests": [{"input": "1"}]}, "'tests' is not a list of objects"),
        ({"tests": [{"input": "1", "output": "1"}, "assert 1"]}, "'tests' is not a list"),
        ({"tests": [{"input": "1", "output": "1", "testtype": "functional"}]}, "testtype"),
        ({"public_test_cases": "[]"}, "there are no tests"),
        (
            {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps("[]"))).decode()},
            "pickle there, which is never read",
        ),
    ],
)
def test_tests_of_another_form_are_named(record, message):
    with pytest.raises(DataError, match=message):
        code({"completion": SUM, **record})


@pytest.mark.parametrize(
    ("printed", "expected", "same"),
    [
        ("3", "3\n", True),
        ("  1 2  \r\n3\t\n\n", "1 2\n3", True),
        ("1  2", "1 2", True),  # as numbers
        ("a  b", "a b", False),
        ("1\n\n2", "1\n2", False),
        ("1 2", "1\n2", False),
        ("1.50 2e3", "1.5 2000", True),
        ("0.3333333", "0.33333333", False),
        ("50000000000000000", "50000000000000001", False),
        ("nan", "nan", True),
        ("sNaN 1", "sNaN 2", False),
        ("inf", "Infinity", False),
        ("1_0", "10", False),
        ("YES", "Yes", False),
        ("x 1.0", "x 1", False),
        ("", "", True),
        ("", "0", False),
        ("1e999999999999999999", "1", False),
        ("9" * 1_000_000, "9" * 1_000_000 + ".0", True),
    ],
)
def test_white_space_at_the_ends_and_the_writing_of_numbers_do_not_count(printed, expected, same):
    assert agrees(printed, expected) == same


RIGHT = {
    "lines": "import sys\nfor line in sys.stdin: print(sum(map(int, line.split())))",
    "bytes": "import os\nprint(sum(map(int, os.read(0, 100).split())))",
    "buffer": "import sys\n"
    "sys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))",
    "file": "print(sum(map(int, open(0).read().split())))",
    "device": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "twice": "import sys\na = sys.stdin.read(); b = sys.stdin.read()\n"
    "print(sum(map(int, (a + b).split())))",
    "at exit": "import atexit, io, sys\nout = sys.stdout = io.StringIO()\n"
    "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\n" + SUM,
    "thread": f"import threading\ndef main(): {SUM}\nthreading.Thread(target=main).start()",
    "main": f"def main():\n    {SUM}\nif __name__ == '__main__':\n    main()",
    "exit": f"{SUM}\nimport sys; sys.exit()",
    "noise": f"import sys\nprint('x' * (1 << 20), file=sys.stderr)\n{SUM}",
    "future": "from __future__ import annotations\nimport sys\n"
    f"sys.setrecursionlimit(10**6)\n{SUM}",
    "pickled": "import pickle\nclass A: pass\npickle.loads(pickle.dumps(A()))\n" + SUM,
}


@pytest.mark.parametrize("name", RIGHT)
def test_programs_read_and_print_as_programs_do(name):
    assert judge(RIGHT[name]) == (1.0, {"correct": True, "passed": 2, "total": 2})


def test_each_input_has_a_process_of_its_own():
    keeps = "import builtins\nn = builtins.n = getattr(builtins, 'n', 0) + 1\nprint(n)"
    assert judge(keeps, [("", "1")] * 3).reward == 1
    assert judge("print(input() + '|')", [("a\n", "a|"), ("a", "a|")]).reward == 1
    with_newline = "import sys\nprint(repr(sys.stdin.read()))"
    assert judge(with_newline, [("a\n", r"'a\n'"), ("a", "'a'"), ("", "''")]).reward == 1
    assert judge("print(len(input()))", [("ü𝔸" * 10**6, "2000000")]).reward == 1
    setup = {"test_setup_code": "from math import *", "completion": "print(gcd(4, 6))"}
    assert code({**setup, "tests": [{"input": "", "output": "2"}]}, HANGS).reward == 1


WRONG = {
    "print(3)": "printed '3' instead of '9' for '4 5'",
    "print(int(input()))": "ValueError: invalid literal for int() with base 10: '1 2' for '1 2'",
    "x =": "SyntaxError: invalid syntax for '1 2'",
    f"{SUM}\nimport sys; sys.exit(3)": "exit 3",
    f"{SUM}\nimport os; os._exit(1)": "exit 1",
    f"{SUM}\ninput(); input()": "EOFError",
    "print('x' * 70000)": "printed more than 65540 bytes",
    "import sys; sys.stdout.buffer.write(b'\\xff3')": "instead of '3'",
}


@pytest.mark.parametrize("completion", WRONG)
def test_what_is_wrong_is_said(completion):
    verdict = judge(completion)
    assert verdict.reward == 0
    assert WRONG[completion] in verdict.detail["why"]
    assert len(verdict.detail["why"]) < 500


HOSTILE = {
    "while True: pass": "took longer than 1 s",
    "import time; time.sleep(1000)": "took longer than 1 s",
    "import sys\nfor fd in (0, 1, 2): __import__('os').close(fd)\nwhile True: pass": "took longer",
    "while True: print('x' * (1 << 16))": "printed more than",
    "import sys\nwhile True: sys.stderr.write('x' * (1 << 16))": "took longer than 1 s",
    "import os\nwhile True: os.fork()": "PermissionError",
    "import os; os.setsid()": "PermissionError",
    "import os; os.setpgid(0, 0)": "PermissionError",
    "import os; os.kill(os.getppid(), 9)": "PermissionError",
    "import subprocess; subprocess.Popen(['/bin/sleep', '1000'])": "PermissionError",
    "open('/tmp/dlmctl-left', 'w')": "PermissionError",
    "x = []\nwhile True: x.append(bytearray(1 << 24))": "MemoryError",
    "import ctypes; ctypes.string_at(0)": "signal 11",
    "import os\nfor fd in range(3, 100):\n    try: os.write(fd, b'x')\n    except OSError: pass\n"
    "    else: raise KeyError(fd)\nraise LookupError('closed')": "LookupError: closed",
}


@pytest.mark.parametrize("completion", HOSTILE)
def test_hostile_programs_get_nothing_and_leave_nothing(completion, scratch):  # noqa: F811
    limit = 1.0 if "longer" in HOSTILE[completion] else HANGS
    verdict = judge(completion, time_limit=limit, memory=256 << 20)
    assert verdict.reward == 0
    assert HOSTILE[completion] in verdict.detail["why"]
    wait_for(lambda: not left_behind(scratch))  # on a busy machine, it takes a moment
    assert list(scratch.iterdir()) == []
    assert not Path("/tmp/dlmctl-left").exists()


def test_a_program_cannot_find_what_is_expected_of_it():
    """Neither in objects nor in frames of the process that it runs in."""
    secret = "7391846205"
    search = (
        "import gc, sys\ntexts, frame = [], sys._getframe()\n"
        "while frame: texts.append(repr(frame.f_locals)); frame = frame.f_back\n"
        "kinds = (dict, list, tuple)\n"
        "texts += [repr(thing) for thing in gc.get_objects() if type(thing) in kinds]\n"
        "half = '73918'\nprint(any(half + '46205' in text for text in texts))\n"
        "print(any('known' + 'input' in text for text in texts))"
    )
    verdict = judge(search, [("knowninput", secret)])
    assert verdict.detail["why"].startswith(r"printed 'False\nTrue'")


def test_programs_are_not_run_where_they_cannot_be_confined(
    tmp_path,
    monkeypatch,
    scratch,  # noqa: F811
):
    unconfined_harness(tmp_path, monkeypatch)
    mark = tmp_path / "mark"
    writes = f"open({str(mark)!r}, 'w').close()\n{SUM}"
    with pytest.raises(UnavailableError, match="--allow-unconfined"):
        judge(writes)
    assert not mark.exists()
    assert judge(writes, unconfined=True).reward == 1
    assert mark.exists()
    forks = f"import os, time\n{SUM}\nif os.fork() == 0: time.sleep(1000)"
    judge(forks, unconfined=True)  # who has all privileges may fork all the same
    wait_for(lambda: not left_behind(scratch))


def test_many_inputs_share_the_time(monkeypatch):
    slow = "import time; time.sleep(0.3); " + SUM
    verdict = judge(slow, PAIRS * 50, time_limit=2.0)
    assert verdict.reward == 0
    assert verdict.detail["why"] == "took longer than 2 s"
    assert verdict.detail["passed"] < 7
    assert sandbox.HARNESS.exists()
