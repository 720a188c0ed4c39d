"""Unit tests on code that nobody has read: right is right, and hostile is 0 and leaves nothing."""

import os
import tempfile
from pathlib import Path

import pytest
from conftest import HANGS, invoke, read_jsonl, wait_for

from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.records.jsonl import Record, dump
from dlmctl.verifiers import code as module
from dlmctl.verifiers import sandbox
from dlmctl.verifiers.code import code, extract_code
from dlmctl.verifiers.registry import verify

ADD = "def add(a, b):\n    return a + b\n"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]
HUMANEVAL = {
    "task": "humaneval",
    "prompt": "from typing import List\n\ndef total(numbers: List[int]) -> int:\n    '''Sum.'''\n",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n",
    "entry_point": "total",
}


def judge(completion, tests=TESTS, time_limit=HANGS, **options):
    return code({"completion": completion, "tests": tests}, time_limit=time_limit, **options)


@pytest.fixture(scope="module", autouse=True)
def confined():
    """Whether code can be confined here is seen by trying; where it cannot, it is not run."""
    try:
        judge(ADD)
    except UnavailableError as error:
        pytest.skip(f"{error}")


def test_code_is_taken_from_the_last_fence_of_python():
    assert extract_code(ADD) == ADD
    assert extract_code(f"So:\n```python\n{ADD}```\nDone.") == ADD
    assert extract_code(f"```python\nold\n```\n```py\n{ADD}```\n```\noutput\n```") == ADD
    assert extract_code(f"```\n{ADD}```") == ADD
    assert extract_code(f"```python\n{ADD}") == ADD
    assert extract_code("```python\n" * 5001) == ""


def test_right_code_passes_and_wrong_code_says_its_first_failure():
    assert judge(ADD) == (1.0, {"correct": True, "passed": 2, "total": 2})
    verdict = judge("def add(a, b):\n    return 3\n")
    assert verdict.reward == 0
    assert (verdict.detail["passed"], verdict.detail["total"]) == (1, 2)
    assert verdict.detail["why"] == "AssertionError in assert add(-1, 1) == 0"
    assert "SyntaxError" in judge("def add(a, b) return").detail["why"]
    assert judge(ADD, tests="assert add(1, 2) == 3\nassert add(2, 2) == 4").reward == 1


def test_records_of_humaneval_and_mbpp_are_judged_as_they_are():
    body = {**HUMANEVAL, "completion": "    return sum(numbers)\n"}
    chat = "```python\ndef total(numbers: List[int]) -> int:\n    return sum(numbers)\n```"
    mbpp = {
        "task": "mbpp",
        "completion": ADD,
        "test_list": ["assert add(one, 2) == 3"],
        "test_setup_code": "one = 1",
        "challenge_test_list": [],
    }
    wrong = {**HUMANEVAL, "completion": "    return 0\n"}
    rows = [Record(row) for row in (body, {**HUMANEVAL, "completion": chat}, mbpp, wrong)]
    assert [row["rewards"] for row in verify(rows)] == [{"code": r} for r in (1, 1, 1, 0)]


def test_threads_and_event_loops_work():
    threads = "import threading\nt = threading.Thread(target=print); t.start(); t.join()\n"
    loop = "import asyncio\nasync def f(): await asyncio.sleep(0)\nasyncio.run(f())\n"
    assert judge(threads + loop + ADD).reward == 1


HOSTILE = {
    "sys.exit": "import sys; sys.exit(0)",
    "os._exit": "import os; os._exit(0)",
    "SystemExit in a test": "def add(a, b): raise SystemExit(0)",
    "os._exit in a test": "import os\ndef add(a, b): os._exit(0)",
    "forged lines": "import os\nfor fd in range(1, 60):\n"
    "    try: os.write(fd, b'x load null\\nx 0 null\\nx 1 null\\nx end null\\n')\n"
    "    except OSError: pass\nos._exit(0)",
    "endless loop": "while True: pass",
    "endless loop in a test": "def add(a, b):\n    while True: pass",
    "what cannot be caught": "while True:\n    try:\n        while True: pass\n"
    "    except BaseException: pass",
    "signals ignored": "import signal\nfor s in (1, 2, 14, 15, 24): signal.signal(s, "
    "signal.SIG_IGN)\nwhile True: pass",
    "asleep": "import time; time.sleep(1000)",
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: break\n"
    "raise ValueError",
    "child": "import subprocess; subprocess.Popen(['/bin/sleep', '1000'])",
    "memory bomb": "x = []\nwhile True: x.append(bytearray(1 << 24))",
    "power": "9**9**9**9",
    "huge file": "f = open('big', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "file elsewhere": "open('/tmp/dlmctl-left', 'w')",
    "working directory": "import os; os.rmdir(os.getcwd()); raise ValueError",
    "home": "import os; os.listdir('/tmp')",
    "flood": "while True: print('x' * (1 << 20))",
    "flood of the report": "import os\nwhile True:\n    for fd in range(3, 60):\n"
    "        try: os.write(fd, b'x' * 65536)\n        except OSError: pass",
    "closed": "import os; os.closerange(0, 100)\nwhile True: pass",
    "parent": "import os, signal; os.kill(os.getppid(), signal.SIGKILL)",
    "parent's limits": "import os, resource\n"
    "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (1, 1))",
    "socket": "import socket; socket.socket()",
    "mode of a file": "import os; os.chmod(os.getcwd(), 0)",
    "shared memory": "from multiprocessing import shared_memory as s\n"
    "s.SharedMemory(create=True, size=4096)",
    "recursion": "import sys; sys.setrecursionlimit(10**9)\ndef add(a, b): return add(a, b)",
    "nesting": "(" * 100_000,
    "message": "class E(Exception):\n    def __str__(self): return 'x' * (1 << 24)\nraise E",
    "crash": "import ctypes; ctypes.string_at(0)",
}


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """The directory for temporary files, empty."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_behind(scratch: Path) -> list[str]:
    """Processes whose working directory is or was beneath that for temporary files."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        try:
            where = os.readlink(entry)
        except OSError:
            continue
        if where.startswith(f"{scratch}/"):
            found.append(f"{entry.parent.name} in {where}")
    return found


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_code_gets_nothing_and_leaves_nothing(name, scratch):
    limits = resource_limits()
    verdict = judge(HOSTILE[name], time_limit=1.0, memory=256 << 20)
    assert verdict.reward == 0
    assert verdict.detail["passed"] == 0
    assert 0 < len(verdict.detail["why"]) < 500
    assert left_behind(scratch) == []
    assert list(scratch.iterdir()) == []
    assert not Path("/tmp/dlmctl-left").exists()
    assert resource_limits() == limits


def resource_limits() -> tuple[int, int]:
    import resource

    return resource.getrlimit(resource.RLIMIT_NOFILE)


def test_hostile_code_is_stopped_by_what_is_meant_to_stop_it():
    """Each why, so that no case is 0 by accident, as by a fault in the harness."""
    expected = {
        "os._exit": "exit 0",
        "sys.exit": "SystemExit",
        "endless loop": "took longer than 0.5 s",
        "fork bomb": "ValueError",
        "child": "PermissionError",
        "huge file": "PermissionError",
        "home": "PermissionError",
        "parent": "PermissionError",
        "parent's limits": "PermissionError",
        "socket": "PermissionError",
        "mode of a file": "PermissionError",
        "memory bomb": "MemoryError",
        "working directory": "PermissionError",
    }
    for name, why in expected.items():
        limit = 0.5 if "longer" in why else HANGS
        verdict = judge(HOSTILE[name], time_limit=limit, memory=256 << 20)
        assert why in verdict.detail["why"], name


def test_environment_and_standard_input_are_empty(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "hush")
    check = "import os, sys\nassert 'SECRET_KEY' not in os.environ\nassert sys.stdin.read() == ''"
    assert judge("", tests=[check]).reward == 1


def test_a_process_that_is_left_would_be_seen(scratch):
    import subprocess

    (scratch / "x").mkdir()
    with subprocess.Popen(["sleep", "1000"], cwd=scratch / "x") as process:
        assert left_behind(scratch)
        process.kill()


def unconfined_harness(tmp_path, monkeypatch):
    script = tmp_path / "harness.py"
    whole = sandbox.HARNESS.read_text()
    script.write_text(whole.replace('sys.platform != "linux"', "True"))
    assert script.read_text() != whole
    monkeypatch.setattr(sandbox, "HARNESS", script)


def test_what_cannot_be_confined_is_not_run_unless_allowed(tmp_path, monkeypatch, capsys):
    unconfined_harness(tmp_path, monkeypatch)
    monkeypatch.setattr(module, "_warned", False)
    mark = tmp_path / "mark"
    writes = f"open({str(mark)!r}, 'w').close()\n{ADD}"
    with pytest.raises(UnavailableError, match="--allow-unconfined"):
        judge(writes)
    assert not mark.exists()
    for _ in range(2):
        verdict = judge(writes, unconfined=True)
    assert (verdict.reward, verdict.detail["confined"]) == (1, False)
    assert mark.exists()
    assert capsys.readouterr().err.count("runs unconfined") == 1


def test_unconfined_code_is_stopped_with_its_children(scratch, tmp_path_factory, monkeypatch):
    unconfined_harness(tmp_path_factory.mktemp("harness"), monkeypatch)
    forks = "import os, time\nif os.fork() == 0: time.sleep(1000)\nos._exit(0)"
    verdict = judge(forks, unconfined=True)
    assert verdict.reward == 0
    if os.getuid() == 0:  # who has all privileges may fork all the same
        assert "exit 0" in verdict.detail["why"]
    wait_for(lambda: not left_behind(scratch))  # a child that is killed takes a moment to go
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "there are no tests"),
        ({"tests": []}, "there are no tests"),
        ({"tests": [1]}, "'tests' is neither"),
        ({"tests": ["x"], "entry_point": "a b"}, "not the name of a function"),
    ],
)
def test_tests_that_are_none_are_named(fields, message):
    with pytest.raises(DataError, match=message):
        code({"completion": ADD, **fields})


def test_the_command_judges_code(tmp_path):
    def verdicts(limit, *completions):
        rows = [{"completion": text, "tests": TESTS} for text in completions]
        (tmp_path / "in.jsonl").write_bytes(b"".join(dump(row) for row in rows))
        options = ["--verifier", "code", "--time-limit", limit, "--memory-limit", "256M"]
        result = invoke("verify", tmp_path / "in.jsonl", *options, "-o", tmp_path / "out.jsonl")
        assert result.exit_code == 0, result.output
        made = read_jsonl(tmp_path / "out.jsonl")
        return [(row["reward"], row["verdict"]["code"].get("why")) for row in made]

    assert verdicts("0.5", "while True: pass") == [(0, "took longer than 0.5 s")]
    greedy = "x = bytearray(300 << 20)\n" + ADD
    assert verdicts(f"{HANGS:g}", ADD, greedy) == [(1, None), (0, "MemoryError")]
    assert os.getcwd()
