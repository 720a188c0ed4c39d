"""Ctrl-C and SIGTERM: a line that says where the command stands, and the end within a second."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import orjson
import pytest
from conftest import HANGS, read_jsonl, wait_for
from preload import parent
from preloaded import Command

from dlmctl.records import interrupts

RECORD = {"id": "a", "task": "countdown", "numbers": [1, 2], "target": 3, "completion": "1+2"}
LINE = orjson.dumps(RECORD) + b"\n"


class Running:
    """A command whose standard input we write."""

    def __init__(self, line, directory):
        source, self.input = os.pipe()
        self.errors, self.output = directory / "err", directory / "out"
        files = [
            os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for path in (self.output, self.errors)
        ]
        self.command = Command(parent(), line.split(), [source, *files], directory)
        for number in (source, *files):
            os.close(number)

    def give(self, *lines):
        os.write(self.input, b"".join(lines))

    def wait_for(self, condition):
        wait_for(condition, self.errors.read_text)

    def stop(self, *signals):
        """The exit code after these signals, and what was said."""
        for number in signals:
            with contextlib.suppress(ProcessLookupError):
                self.command.send_signal(number)
            time.sleep(0.1)  # of several that wait for a process the lowest is given first
        code = self.command.wait()
        os.close(self.input)
        return code, self.errors.read_text()


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stage_says_what_it_has_written(tmp_path, number):
    running = Running("verify -q", tmp_path)
    running.give(LINE, LINE)
    running.wait_for(lambda: lines_in(running.output) == 2)
    # Those behind the first change nothing. (Of two that wait, the kernel hands over SIGINT first.)
    code, said = running.stop(number, signal.SIGTERM, signal.SIGTERM)
    assert code == -number
    assert said == "dlmctl: verify interrupted: 2 records were written\n"


def test_a_stage_with_a_file_says_how_to_go_on_and_does(tmp_path):
    running = Running("verify -o made.jsonl", tmp_path)
    running.give(LINE, LINE)
    partial = tmp_path / "made.jsonl.partial"
    running.wait_for(lambda: lines_in(partial) == 2)
    code, said = running.stop(signal.SIGINT)
    assert code == -signal.SIGINT
    assert said == (
        "dlmctl: verify interrupted: 2 records are in made.jsonl.partial; the same command with "
        "--resume continues it\n"
    )
    running = Running("verify -o made.jsonl --resume", tmp_path)
    running.give(3 * LINE)
    running.wait_for(lambda: lines_in(partial) == 3)
    code, said = running.stop(signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert "interrupted: 3 records are in made.jsonl.partial" in said


def test_before_the_first_record_there_is_nothing_to_say(tmp_path):
    (tmp_path / "run").mkdir()
    running = Running("update -o run", tmp_path)
    running.wait_for((tmp_path / "run" / ".lock").exists)
    code, said = running.stop(signal.SIGINT)
    assert (code, said) == (-signal.SIGINT, "dlmctl: update interrupted\n")


def test_what_does_not_listen_is_ended_all_the_same(tmp_path):
    assert interrupts.GRACE < 1
    (tmp_path / "stubborn.py").write_text(
        "import time, pathlib\n"
        "def judge(record):\n"
        "    pathlib.Path('begun').touch()\n"
        "    while True:\n"
        "        try:\n"
        "            time.sleep(60)\n"
        "        except BaseException:\n"
        "            pass\n"
    )
    running = Running("verify --verifier stubborn:judge -o made.jsonl", tmp_path)
    running.give(LINE)
    running.wait_for((tmp_path / "begun").exists)
    code, said = running.stop(signal.SIGTERM, signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert said.startswith("dlmctl: verify interrupted: 0 records are in made.jsonl.partial")
    assert said.count("\n") == 1


def test_an_update_is_left_at_its_newest_checkpoint(tmp_path, saved_models):
    line = f"update -q --algo sft -m {saved_models('llada')} --prompts-per-step 1 --save-every 2"
    running = Running(f"{line} -o run", tmp_path)
    record = {"id": "a", "prompt": "1+2", "completion": "3"}
    running.give(*[orjson.dumps(record) + b"\n"] * 3)
    running.wait_for(lambda: lines_in(running.output) == 3)
    code, said = running.stop(signal.SIGINT)
    assert code == -signal.SIGINT
    assert said.splitlines()[1:] == [
        "dlmctl: update interrupted: run was at step 3; the newest saved state is of step 2, where "
        "the same command resumes"
    ]
    assert os.readlink(tmp_path / "run" / "latest") == "step-000002"
    assert [m["step"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    again = Running(f"{line} -o run", tmp_path)
    again.give(*[orjson.dumps(record) + b"\n"] * 1)
    again.wait_for(lambda: lines_in(running.output) == 1)
    assert [m["step"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]
    again.stop(signal.SIGINT)


def test_a_long_training_is_left_at_its_newest_state(tmp_path):
    line = "distill teacher builtin:digits#0:8 --network mlp --width 8 -b 4 --log-every 1 -q -o run"
    running = Running(f"{line} --first-checkpoint 5 --steps 1000000000", tmp_path)
    running.wait_for((tmp_path / "run" / "state" / "latest").exists)
    code, said = running.stop(signal.SIGINT)
    assert code == -signal.SIGINT
    assert said.startswith("dlmctl: distill teacher interrupted: run was at step ")
    assert "; the newest saved state is of step " in said
    assert said.count("\n") == 1


LISTENS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
"""We ourselves may be in the background of a shell, which ignores Ctrl-C."""
SIGNALLED_AT = """
import os, sys
from dlmctl.__main__ import main
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Finder())
sys.argv = ["dlmctl", *{line!r}]
main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["dlmctl.cli", "orjson", "typer.main", "dlmctl.commands.verify"])
def test_a_signal_amid_the_imports_is_no_traceback(name, number):
    code = SIGNALLED_AT.format(name=name, number=int(number), line=["verify"])
    done = subprocess.run(
        [sys.executable, "-c", LISTENS + code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -number
    # What was imported goes on, and may see the end of its input before it hears of the signal.
    ends = (
        "",
        "dlmctl: verify interrupted\n",
        "dlmctl: verify interrupted: 0 records were written\n",
    )
    assert done.stderr in ends


def test_no_import_is_broken_off_by_an_exception(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "try: time.sleep(60)\n"
        "except BaseException as error: print(repr(error), flush=True)\n"
    )
    code = "from dlmctl.records import interrupts; interrupts.install('verify'); import slow"
    done = subprocess.run(
        [sys.executable, "-c", LISTENS + f"import sys; sys.path.append({str(tmp_path)!r})\n{code}"],
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "")
    assert done.stderr == "dlmctl: verify interrupted\n"


def test_ctrl_c_where_nothing_can_be_raised_is_no_traceback_either():
    code = (
        "import os, signal, time\n"
        "from dlmctl.records import interrupts\n"
        "class Last:\n"
        "    def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01)\n"
        "interrupts.install('verify')\n"
        "Last()\n"
        "time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", LISTENS + code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "dlmctl: verify interrupted\n")


def test_an_ignored_ctrl_c_stays_ignored():
    code = SIGNALLED_AT.format(name="typer.main", number=int(signal.SIGINT), line=["--version"])
    line = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{code}"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
