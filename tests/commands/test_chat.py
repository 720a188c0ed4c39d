"""`chat` at a terminal and in scripts, also with models that write what terminals obey."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from conftest import invoke, read_jsonl, shell
from preload import parent
from preloaded import HANGS, Command

from dlmctl.models.saving import save_policy
from dlmctl.models.small import make_policy
from dlmctl.models.tokenizers import byte_tokenizer
from dlmctl.settings.small import SmallModel

KNOWN_CODES = re.compile(rb"\x1b\[(\d*[AK]|[\d;]*m|\?2004[hl])|\x1b\[C|\x07(?=\r)")
"""What our drawing and the editing of lines send."""
PUZZLE = "0031102001033400="


class Terminal:
    """`chat` on a terminal that has its input and its output."""

    def __init__(self, line: str, directory: Path, **environment: str) -> None:
        self.master, terminal = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60"} | environment
        words = ["chat", *line.split()]
        self.command = Command(parent(), words, [terminal] * 3, directory, environment)
        os.close(terminal)
        self.seen = b""

    def until(self, text: str) -> str:
        """What came up to and with this text."""
        deadline = time.monotonic() + HANGS
        while text.encode() not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 1)[0]:
                self.seen += os.read(self.master, 4096)
        before, self.seen = self.seen.split(text.encode(), 1)
        return before.decode() + text

    def interrupt_prompt(self) -> None:
        """Ctrl-C where a line is awaited, as often as it takes.

        Python does not see a signal between the prompt and the wait for a key, until the next one.
        """
        while True:
            self.command.send_signal(signal.SIGINT)
            if select.select([self.master], [], [], 5)[0]:
                return

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def end(self) -> str:
        """The rest of what came."""
        try:
            while select.select([self.master], [], [], HANGS)[0]:
                self.seen += os.read(self.master, 4096)
        except OSError:  # how Linux says that the other side is closed
            pass
        os.close(self.master)
        return self.seen.decode()


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of a family that writes any bytes."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(f"bytes-{family}")
            small = SmallModel(family, 16, 1, 2, gen_length=200)
            save_policy(make_policy(small, byte_tokenizer(), seed=3), made[family])
        return made[family]

    return get


@pytest.fixture(autouse=True)
def colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)


def hostile(text: str) -> bool:
    return bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text))


def test_a_conversation_with_a_masked_model(tmp_path):
    """Answers, commands, errors, an interrupted answer, records that other commands read."""
    chat = Terminal("builtin:puzzles", tmp_path)
    assert "each prompt stands alone" in chat.until("> ")
    chat.type(PUZZLE)
    first = chat.until("16 tokens, 16 passes")
    assert "░" in first
    assert "\x1b[38;5;69m" in first, "the colour of the first step"
    chat.type("/set steps 4")
    assert "steps 4" in chat.until("eos normal")
    chat.type("/set steps 99x")
    chat.until("--steps 99x: it is a whole number")
    chat.type("letters")
    chat.until("has no tokens for 'letters'")
    chat.type("/nothing")
    chat.until("is no command")
    chat.type(PUZZLE)
    chat.until("16 tokens, 4 passes")
    chat.type("/save answers.jsonl")
    chat.until("2 answers in answers.jsonl")
    (tmp_path / "mine").write_text("mine")
    chat.type("/save mine")
    chat.until("mine is there")
    chat.type("/quit")
    rest = chat.end()
    assert chat.command.wait() == 0, rest
    assert (tmp_path / "mine").read_text() == "mine"
    records = read_jsonl(tmp_path / "answers.jsonl")
    assert [record["rollout"]["nfe"] for record in records] == [16, 4]
    viewed = invoke("view", tmp_path / "answers.jsonl").stdout
    assert re.findall("turn-. sample 0", viewed) == ["turn-1 sample 0", "turn-3 sample 0"]
    again = tmp_path / "again.jsonl"
    again.write_bytes(orjson.dumps({"id": "turn-1", "prompt": PUZZLE}))
    done = invoke("rollout", again, "-m", "builtin:puzzles", "-n", 1)
    assert orjson.loads(done.stdout) == records[0]


def test_ctrl_c_interrupts_an_answer_and_a_second_one_ends(bytes_model, tmp_path):
    model = bytes_model("llada")
    chat = Terminal(f"{model} --gen-length 4000 --step-time 0.01", tmp_path)
    chat.until("> ")
    chat.type("hello")
    chat.until("3 of 4000 tokens")
    chat.command.send_signal(signal.SIGINT)
    chat.until("interrupted")
    chat.until("> ")
    chat.type("/save none.jsonl")
    chat.until("0 answers in")
    chat.until("> ")
    chat.interrupt_prompt()
    chat.until("ends")
    chat.until("> ")
    chat.interrupt_prompt()
    rest = chat.end()
    assert chat.command.wait() == 130
    assert "Traceback" not in rest


def test_sigterm_ends_an_answer_at_once(bytes_model, tmp_path):
    chat = Terminal(f"{bytes_model('llada')} --gen-length 4000 --step-time 0.01", tmp_path)
    chat.until("> ")
    chat.type("hello")
    chat.until("3 of 4000 tokens")
    chat.command.send_signal(signal.SIGTERM)
    chat.end()
    assert chat.command.wait() == -signal.SIGTERM


@pytest.mark.parametrize("family", ["llada", "ar"])
def test_what_a_model_writes_is_nothing_that_a_terminal_obeys(family, bytes_model, tmp_path):
    model = bytes_model(family)
    chat = Terminal(f"{model} --seed 1", tmp_path)
    chat.until("> ")
    chat.type("hello")
    chat.until(" passes, ")
    chat.type("/save answers.jsonl")
    chat.until("1 answers in")
    chat.until("> ")
    os.write(chat.master, b"\x04")  # Ctrl-D
    chat.end()
    assert chat.command.wait() == 0
    [record] = read_jsonl(tmp_path / "answers.jsonl")
    assert hostile(record["completion"])
    raw = Terminal(f"{model} hello --seed 1 --once", tmp_path)
    written = raw.end()
    assert raw.command.wait() == 0
    assert not hostile(written.replace("\r\n", "\n"))
    asked = f"printf hello | dlmctl chat {model} --seed 1 --once"
    assert shell(f"{asked} > answer", tmp_path).returncode == 0
    assert (tmp_path / "answer").read_bytes().decode() == record["completion"] + "\n"


def test_only_known_codes_reach_a_terminal_and_no_colours_if_they_are_unwanted(
    bytes_model, tmp_path
):
    chat = Terminal(f"{bytes_model('llada')} --seed 1", tmp_path, NO_COLOR="1")
    seen = chat.until("> ")
    chat.type("hello")
    seen += chat.until(" passes, ")
    chat.type("/quit")
    seen += chat.end()
    assert chat.command.wait() == 0
    left = KNOWN_CODES.sub(b"", seen.encode()).decode()
    assert not hostile(left.replace("\r", "")), left
    assert not re.search(r"\x1b\[(\d+;)*[34]8;", seen)


def test_a_dumb_terminal_gets_text(tmp_path):
    chat = Terminal("builtin:puzzles", tmp_path, TERM="dumb")
    seen = chat.until("> ")
    chat.type(PUZZLE)
    seen += chat.until("\n2231132441233411\r\n")
    chat.type("/quit")
    seen += chat.end()
    assert chat.command.wait() == 0
    assert "\x1b" not in seen


def test_lines_of_a_pipe_are_prompts_and_commands(tmp_path):
    line = f"printf '{PUZZLE}\\n/set steps 1\\n\\n{PUZZLE}\\n/save two.jsonl\\n' | dlmctl chat"
    done = shell(line, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    records = read_jsonl(tmp_path / "two.jsonl")
    assert done.stdout.splitlines() == [record["completion"] for record in records]
    assert [record["rollout"]["nfe"] for record in records] == [16, 1]
    done = shell(f"printf '{PUZZLE}\\nletters\\n{PUZZLE}\\n' | dlmctl chat", tmp_path)
    assert (done.returncode, len(done.stdout.splitlines())) == (65, 1)


def test_an_answer_begins_with_what_it_was_made_to_begin_with():
    said = invoke("chat", "builtin:puzzles", PUZZLE, "--once", "--prefill", "42")
    record = invoke("chat", "builtin:puzzles", PUZZLE, "--once", "--prefill", "42", "--json")
    assert said.stdout == "42" + orjson.loads(record.stdout)["completion"] + "\n"


@pytest.mark.parametrize(
    ("line", "typed", "code", "said"),
    [
        ("--json", b"", 2, "--json is for --once"),
        ("--once", b"\n", 2, "standard input is empty"),
        ("--once", b"\xff", 65, "<stdin>: it is not UTF-8"),
        ("--once", b"letters", 65, "no tokens for 'letters'"),
        ("--once --system be", b"1=", 2, "--system is a message for the chat template"),
        ("--once --remasking sae", b"1=", 2, "only 'rollout' takes"),
        ("nowhere/model --once", b"1=", 75, "nowhere/model is not a directory here"),
        ("", b"\xff\n", 65, "<stdin>: it is not UTF-8"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_line(line, typed, code, said, tmp_path):
    (tmp_path / "typed").write_bytes(typed)
    done = shell(f"dlmctl chat {line} < typed", tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
