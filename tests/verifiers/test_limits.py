"""Limits: no completion and no program keeps `verify` for ever, or makes it grow."""

import os
import resource
import time

import pytest
from conftest import HANGS, invoke, read_jsonl, wait_for

from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.records.jsonl import Record, dump
from dlmctl.settings.verify import Judging
from dlmctl.verifiers import limits, program
from dlmctl.verifiers.limits import Worker
from dlmctl.verifiers.mathematics import judge, math
from dlmctl.verifiers.program import OverrunError, Program
from dlmctl.verifiers.registry import VERIFIERS, find_verifier, verify
from dlmctl.verifiers.vqa import vqa

TASKS = {
    "puzzle": "0031102001033400",
    "solution": "4231132421433412",
    "numbers": [95, 85, 75],
    "target": 2,
    "answer": "1234",
    "scene": [{"colour": "red", "shape": "circle", "row": 1, "column": 1}],
    "wanted": {"sentiment": "positive"},
    "pattern": r"(?:\w+\s?)+x",
    "schema": {"type": "object"},
}
OTHERWISE = {"choice": {"answer": "B"}}
OPTIONAL = {"json-schema": "jsonschema"}
SLOW = {"math", "code", "judge", "reward-model", "regex"}
"""Verifiers with processes, servers or models behind them, whose limits other tests hold."""
N = 20_000
HOSTILE = {
    "power": r"\boxed{9**9**9**9}",
    "open parentheses": "(" * N,
    "parentheses": f"<answer>{'(' * N}1{')' * N}</answer>",
    "boxes": "\\boxed{" * N + "1" + "}" * N,
    "digits": "1" * N,
    "digits in an answer": f"<answer>{'9' * N}</answer>",
    "decimals": "1." + "1" * N,
    "thousands": "1,234" + ",234" * N,
    "fractions of many digits": "9" * 400 + "/7",
    "denominator": "1/" + "3" * N,
    "slashes": "1/" * N,
    "spaces": "1" + " " * N + "x",
    "spaces behind a fraction": "\\frac1" + " " * N + "x",
    "spaces before a fraction": "1" + " " * N + "\\frac",
    "nested fractions": "\\frac{1}{" * (N // 9) + "1" + "}" * (N // 9),
    "tags": "<reasoning>x</reasoning><answer>" * (N // 10),
    "tags on lines": "<reasoning>\nx\n</reasoning>\n<answer>\n" * (N // 10),
    "answers": "<answer>" * N,
    "spaces behind the word": "answer" + " " * N + "b",
    "operators": "1+" * N + "1",
    "separators": "1 2 3 4 1 2 3 4 1 2 3 " + "|" * N,
    "description": f"<description>{' ' * N}</description>",
    "other digits": "<answer>①²</answer>",
    "null": "\0" * 100,
}


@pytest.mark.parametrize("name", [name for name in VERIFIERS if name not in SLOW])
def test_built_in_verifiers_are_safe_by_construction(name):
    """Without any limit of time; before, digits, tags or spaces took minutes or raised."""
    if name in OPTIONAL:
        pytest.importorskip(OPTIONAL[name])
    verifier = find_verifier(name)
    task = {**TASKS, **OTHERWISE.get(name, {})}
    for what, completion in HOSTILE.items():
        begin = time.process_time()
        verdict = verifier({**task, "completion": completion})
        assert time.process_time() - begin < 2, what
        assert verdict.reward <= 1, what
        assert len(dump(verdict.detail)) < 2000, what


@pytest.mark.parametrize("name", ["format", "gsm8k", "tags-soft", "vqa", "countdown"])
def test_their_time_grows_as_the_completion_does(name):
    verifier = find_verifier(name)

    def seconds(size):
        texts = [
            "<reasoning>x</reasoning><answer>" * (size // 30),
            "1" * size,
            "1" + " " * size + "x",
            "\\frac{1}{" * (size // 9),
        ]
        begin = time.process_time()
        for text in texts:
            verifier({**TASKS, "completion": text})
        return time.process_time() - begin

    # Eight times as long: 8 where it is linear, 64 where it is quadratic.
    assert seconds(240_000) < 24 * max(seconds(30_000), 0.01)


def test_an_alarm_stops_what_takes_too_long_all_the_same(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "endless", f"{__name__}:endless")
    find_verifier.cache_clear()
    rows = [Record(completion="x"), Record(completion="y")]
    done = list(verify(rows, ["endless"], Judging(time_limit=0.2)))
    assert [row["reward"] for row in done] == [0, 0]
    assert done[0]["verdict"]["endless"] == {"correct": False, "why": "took longer than 0.2 s"}


def endless(record):
    import re

    # Hours, within one call of the library.
    return float(re.fullmatch("(a+)+b", "a" * 40) is not None)


def test_math_and_vqa_give_up_on_towers_and_go_on(monkeypatch):
    judge()  # its start has time apart
    tower = r"\boxed{9^{9^{9^{9}}}}"
    verdict = math({"answer": "1234", "completion": tower}, time_limit=0.5)
    assert verdict.reward == 0
    assert verdict.detail["why"] == "took longer than 0.5 s"
    half = {"answer": r"\frac{1}{2}", "completion": r"\boxed{\frac{2}{4}}"}
    assert vqa(half, time_limit=HANGS).reward == 1  # the process is started again

    answers = [rf"\frac{{{i}}}{{7}}" for i in range(10)]
    asked = []
    monkeypatch.setattr(
        "dlmctl.verifiers.vqa.math", lambda *given: asked.append(given) or math(*given)
    )
    verdict = vqa({"answers": answers, "completion": tower}, time_limit=0.5)
    assert len(asked) == 1  # the limit is one for all references
    assert verdict.reward == 0
    assert "took longer" in verdict.detail["why"]


OWN = """
import os, time
def slow(record):
    print("a message that is no verdict")
    if record["completion"] == "sleep":
        time.sleep(1000)
    if record["completion"] == "power":
        9 ** 9 ** 9 ** 9
    if record["completion"] == "die":
        os._exit(3)
    if record["completion"] == "raise":
        raise ValueError("no such thing")
    if record["completion"] == "nan":
        return float("nan")
    return 0.5, {"seen": record["completion"]}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_limits.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_limits:slow"


def test_functions_of_others_are_killed_and_started_again(own, capsys):
    """9**9**9**9 is one call of C, which no alarm interrupts."""
    rows = [Record(completion=text) for text in ("a", "power", "b", "sleep")]
    # Long enough for those that judge at once, on a machine that does much else.
    done = list(verify(rows, [own], Judging(time_limit=3.0)))
    assert [row["reward"] for row in done] == [0.5, 0, 0.5, 0]
    assert done[2]["verdict"][own] == {"seen": "b"}
    assert done[3]["verdict"][own]["why"] == "took longer than 3 s"
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("took longer than 3 s") == 1


def test_functions_of_others_that_fail_are_named(own):
    worker = Worker(own, HANGS)
    try:
        for text, message in (
            ("die", "exit 3"),
            ("raise", "no such thing"),
            ("nan", "no finite number"),
        ):
            with pytest.raises(DataError, match=message):
                worker({"completion": text})
        assert worker({"completion": "a"}).reward == 0.5
    finally:
        worker.close()


def test_an_alarm_leaves_the_handler_that_was_there():
    import signal

    before = signal.getsignal(signal.SIGALRM)
    alarm = limits.Alarm(0.05)
    with pytest.raises(limits.TookTooLongError), alarm:
        time.sleep(5)
    with alarm:
        pass
    time.sleep(0.1)
    alarm.close()
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def asked(command, time_limit=HANGS, memory=None, line=b"{}\n", times=1):
    judge = Program(command, time_limit, memory)
    try:
        return [judge.ask(line) for _ in range(times)]
    finally:
        judge.close()


def test_a_program_has_a_limit_of_memory():
    allocate = "import sys\nfor l in sys.stdin: x = bytearray(300 << 20); print(1, flush=True)"
    command = ["python3", "-c", allocate]
    assert asked(command) == [1]
    assert asked(command, memory=2 << 30) == [1]
    with pytest.raises(DataError, match=r"ended \(exit 1\).*--memory-limit is 209715200 bytes"):
        asked(command, memory=200 << 20)
    with pytest.raises(MissingInputError, match="cannot run no-such-program"):
        asked(["no-such-program"], memory=1 << 30)


def test_an_endless_line_is_no_verdict():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="without an end of line"):
        asked(["sh", "-c", "read x; tr '\\0' x < /dev/zero"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_flood_of_lines_stays_in_its_pipe():
    judge = Program(["yes", "0.5"], HANGS)
    try:
        assert [judge.ask(b"{}\n") for _ in range(3)] == [0.5] * 3
        time.sleep(0.2)
        assert len(judge._output) <= program.LONGEST_LINE + program.CHUNK
    finally:
        judge.close()


def test_a_program_that_does_not_read_has_a_limit_of_time_too():
    """The record is longer than a pipe holds, so that sending it would wait for ever."""
    with pytest.raises(OverrunError, match=r"within 0\.3 s"):
        asked(["sleep", "1000"], 0.3, line=b"x" * (1 << 22) + b"\n")


def test_long_records_and_long_verdicts_pass_at_once():
    """A program that answers while it is still sent to: neither waits for the other."""
    line = b'"' + b"x" * 900_000 + b'"\n'
    assert asked(["cat"], line=line, times=3) == ["x" * 900_000] * 3


def test_what_a_program_started_stops_with_it(tmp_path):
    mark = tmp_path / "pid"
    starts = f"read first; sleep 1000 & echo $! > {mark}; echo 1; wait"
    judge = Program(["sh", "-c", starts], HANGS)
    assert judge.ask(b"{}\n") == 1
    pid = int(mark.read_text())
    assert running(pid)
    judge.time_limit = 0.3
    with pytest.raises(OverrunError):
        judge.ask(b"{}\n")
    wait_for(lambda: not running(pid))  # until whoever is its parent now has taken note


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_the_command_limits_programs(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(dump({"completion": "x"}))
    options = ["--memory-limit", "1G", "--exec", "sh -c 'ulimit -v; cat > /dev/null'"]
    result = invoke("verify", tmp_path / "in.jsonl", *options, "-o", tmp_path / "out.jsonl")
    assert result.exit_code == 0, result.output
    assert read_jsonl(tmp_path / "out.jsonl")[0]["reward"] == 1 << 20
    wrong = invoke("verify", tmp_path / "in.jsonl", "--memory-limit", "much", "--exec", "cat")
    assert wrong.exit_code == 2
