"""How far a command is: what the line says, where it is said, and that it leaves nothing behind."""

import inspect
import os
import pty
import re
import signal
import sys
import time

import orjson
import pytest
from conftest import invoke, shell
from preload import parent
from preloaded import HANGS, Command

from dlmctl.cli import SUBCOMMANDS, functions
from dlmctl.commands import input_lines, progress
from dlmctl.commands.input_lines import Lines
from dlmctl.commands.progress import Gauge, counted, counting, duration, pace, times
from dlmctl.records import interrupts, stderr

RECORD = {"id": "a", "task": "countdown", "numbers": [1, 2], "target": 3, "completion": "1+2"}
LINE = orjson.dumps(RECORD) + b"\n"
QUICK = {
    "chat", "doctor", "init", "merge", "plan", "plot", "pull", "push", "sae-convert", "tensorboard",
    "top", "view",
}  # fmt: skip
"""Commands that are done within a minute, or as soon as files can be read and written; `chat` and
`top`, which are themselves what somebody watches; and `push` and `pull`, whose library shows it."""


class Clock:
    """A clock that goes when it is told to."""

    now = 100.0

    def __call__(self):
        return self.now


def gauge(total=None, done=0):
    clock = Clock()
    return Gauge("samples", total, done, clock), clock


def test_the_line_has_count_rate_and_remaining_time():
    meter, clock = gauge(total=1200)
    clock.now += 60
    meter.reach(340)
    assert meter.text() == "340 of 1,200 samples, 5.7/s, 2 min 32 s left"
    assert meter.text(80) == "340 of 1,200 samples, 28 %, 5.7/s, 2 min 32 s left, 1 min so far"


def test_time_runs_on_while_a_batch_is_made_and_the_rate_does_not_sink():
    meter, clock = gauge(total=128)
    clock.now += 100
    meter.reach(64)
    clock.now += 30
    assert meter.text() == "64 of 128 samples, 38/min, 1 min 10 s left"
    clock.now += 600
    assert meter.text() == "64 of 128 samples, 38/min, 12 min 10 s so far"


def test_without_a_total_the_line_says_how_long_it_took():
    meter, clock = gauge()
    clock.now += 10
    assert meter.text() == "0 samples, 10 s so far"
    meter.advance(5)
    assert meter.text() == "5 samples, 30/min, 10 s so far"


def test_what_was_done_before_counts_but_is_no_part_of_the_rate():
    meter, clock = gauge(total=1000, done=900)
    clock.now += 10
    meter.advance(10)
    assert meter.text() == "910 of 1,000 samples, 1.0/s, 1 min 30 s left"


def test_a_total_that_was_too_small_is_not_shown():
    meter, clock = gauge(total=2)
    clock.now += 1
    meter.reach(3)
    assert meter.text() == "3 samples, 3.0/s, 1 s so far"


def test_figures_stand_beside_the_count_and_go_first_where_there_is_no_room():
    meter, clock = gauge(total=100)
    clock.now += 60
    meter.reach(10, {"reward": 0.4321, "loss": 1.5})
    assert meter.text() == "10 of 100 samples, 10/min, 9 min left, reward 0.432, loss 1.5"
    assert meter.text(60) == "10 of 100 samples, 10 %, 10/min, 9 min left, 1 min so far"
    assert meter.text(30) == "10 of 100 samples, 10 %"
    assert meter.text(10) == "10 of 100 "


def test_units_are_those_that_people_use():
    assert [pace(x) for x in (5.61, 123.4, 0.2, 0.001)] == ["5.6/s", "123/s", "12/min", "3.6/h"]
    spans = {0: "0 s", 59.6: "1 min", 154: "2 min 34 s", 3600: "1 h", 3605: "1 h", 86400: "1 d"}
    assert {seconds: duration(seconds) for seconds in spans} == spans
    assert duration(100_000) == "1 d 3 h"


def test_the_lines_of_files_are_counted_and_of_large_ones_estimated(tmp_path, monkeypatch):
    small, large = tmp_path / "a", tmp_path / "b"
    small.write_text("1\n2\n3")
    large.write_text("12345678\n" * 1000)
    assert input_lines.input_lines([str(small)]).count() == (3, True)
    assert input_lines.input_lines([str(small), str(large)]).times(0.5).count() == (502, True)
    monkeypatch.setattr(input_lines, "COUNTED", 900)
    monkeypatch.setattr(input_lines, "BLOCK", 900)
    lines = input_lines.input_lines([str(large)])
    assert lines.count() == (1000, False)
    assert "3 of about 1,000" in (Gauge("records", lines, 3).text())
    assert input_lines.input_lines([str(tmp_path / "none")]).count() is None
    assert times(Lines(None), 2).times(1, most=7).count() == (7, True)


def test_standard_input_that_is_a_file_tells_from_where_it_stands(tmp_path):
    (tmp_path / "f").write_bytes(3 * LINE)
    code = (
        "import os; from dlmctl.commands.input_lines import input_lines as of; "
        f"os.read(0, {len(LINE)}); lines = of([]); os.read(0, 9); print(lines.count())"
    )
    line = f"python -c '{code}' < f; python -c '{code}' < f; cat f | python -c '{code}'"
    done = shell(line.replace("python", sys.executable), tmp_path, fresh=True)
    assert done.stdout == "(2, True)\n(2, True)\nNone\n"


def slow(count, seconds=0.03):
    for number in range(count):
        time.sleep(seconds)
        yield {"step": 10 * number, "loss": 0.5}


def test_a_log_gets_whole_lines_that_name_the_command(capsys, monkeypatch):
    monkeypatch.setattr(progress, "WRITTEN_S", 0.05)
    interrupts.call("distill teacher")
    made = counted(slow(6), "steps", False, 60, at=lambda r: r["step"] + 10, figures=("loss",))
    assert len(list(made)) == 6
    said = capsys.readouterr().err
    assert said.endswith("\n")
    pattern = r"dlmctl distill teacher: \d+ of 60 steps, .* (left|so far)(, loss 0.5)?"
    assert all(re.fullmatch(pattern, line) for line in said.splitlines())
    assert ", loss 0.5" in said


def test_a_minute_passes_before_the_first_line(capsys):
    assert progress.WRITTEN_S == 60
    list(counted(slow(3), "steps", False))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("means", ["quiet", "rank"])
def test_the_quiet_and_all_ranks_but_the_first_say_nothing(means, capsys, monkeypatch):
    monkeypatch.setattr(progress, "WRITTEN_S", 0.01)
    if means == "rank":
        monkeypatch.setenv("RANK", "1")
    with counting("steps", means == "quiet", 3) as meter:
        for _ in slow(3):
            meter.advance()
    assert meter.count == 3
    assert capsys.readouterr().err == ""


def test_the_environment_makes_a_command_quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "WRITTEN_S", 0.01)
    checks = "import time\ndef nap(record):\n    time.sleep(0.1)\n    return 1\n"
    (tmp_path / "naps.py").write_text(checks)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_bytes(LINE)
    assert "dlmctl verify: " in invoke("verify", "--verifier", "naps:nap", "f").stderr
    monkeypatch.setenv("DLMCTL_QUIET", "1")
    assert invoke("verify", "--verifier", "naps:nap", "f").stderr == ""


def test_every_command_that_may_take_long_has_progress_and_can_be_quiet():
    for name in SUBCOMMANDS.keys() - QUICK:
        for full, function in functions(name).items():
            assert "quiet" in inspect.signature(function).parameters, full
            source = inspect.getsource(inspect.getmodule(inspect.unwrap(function)))
            assert re.search(
                r"\b(counted|counting|write_metrics|take_steps)\(.*?quiet", source, re.S
            ), full


class OnTerminal:
    """`verify` with records from a pipe that we write, and a terminal for the rest."""

    def __init__(self, line, directory, output=None, **environment):
        source, self.input = os.pipe()
        self.master, terminal = pty.openpty()
        files = [source, terminal if output is None else output, terminal]
        environment = {**os.environ, "TERM": "xterm", **environment}
        environment.pop("DLMCTL_QUIET", None)
        self.command = Command(parent(), line.split(), files, directory, environment)
        for number in (source, terminal):
            os.close(number)
        self.seen = b""

    def wait_for(self, text):
        deadline = time.monotonic() + HANGS
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            self.seen += os.read(self.master, 4096)

    def rest(self):
        """All that came; the terminal's other side is closed."""
        try:
            while block := os.read(self.master, 4096):
                self.seen += block
        except OSError:  # how Linux says it
            pass
        os.close(self.master)
        return self.seen.decode()


def test_a_terminal_shows_a_line_that_ctrl_c_takes_away(tmp_path):
    running = OnTerminal("verify -o out", tmp_path)
    os.write(running.input, 2 * LINE)
    running.wait_for(b"2 records, ")
    assert b"so far" in running.seen
    running.command.send_signal(signal.SIGINT)
    assert running.command.wait() == -signal.SIGINT
    os.close(running.input)
    seen = running.rest()
    assert "\x1b[?25l" not in seen  # the cursor
    before, last = seen.split("dlmctl: verify interrupted")
    assert before.endswith("\r\x1b[K")
    assert last.endswith("\r\n")


def test_the_line_makes_way_for_records_and_messages_and_is_gone_in_the_end(tmp_path):
    running = OnTerminal("verify --on-error skip", tmp_path)
    os.write(running.input, LINE)
    running.wait_for(b"1 records, ")
    os.write(running.input, b"nonsense\n" + LINE)
    running.wait_for(b"2 records, ")
    os.close(running.input)
    assert running.command.wait() == 0
    seen = running.rest()
    assert "\r\x1b[Kdlmctl: skipped: <stdin>:2: not JSON" in seen
    assert seen.count('\r\x1b[K{"id":"a"') + seen.startswith('{"id":"a"') >= 1
    assert seen.endswith("\r\x1b[K")


@pytest.mark.parametrize("case", ["pipe", "dumb"])
def test_nothing_is_drawn_within_a_pipe_or_on_a_dumb_terminal(case, tmp_path):
    reading, writing = os.pipe()
    if case == "pipe":
        running = OnTerminal("verify", tmp_path, writing)
    else:
        running = OnTerminal("verify -o out", tmp_path, TERM="dumb")
    os.close(writing)
    os.write(running.input, LINE)
    time.sleep(progress.DRAWN_S + 0.3)
    os.close(running.input)
    assert running.command.wait() == 0
    assert running.rest() == ""
    os.close(reading)


def test_a_long_message_breaks_between_words_on_a_terminal_alone(monkeypatch):
    message = b"dlmctl: of forty-odd words\n"
    monkeypatch.setattr(stderr, "columns", lambda: 20)
    monkeypatch.setenv("TERM", "xterm")
    assert stderr.shown(message) == stderr.ERASE + b"dlmctl: of forty-odd\nwords\n"
    assert stderr.shown(b"\xff not ours, and longer than it is wide") == (
        b"\xff not ours, and longer than it is wide"
    )
    monkeypatch.setenv("TERM", "dumb")
    assert stderr.shown(b"dlmctl: short\n") == b"dlmctl: short\n"
    monkeypatch.setattr(stderr, "columns", lambda: 0)
    assert stderr.shown(message) == message
