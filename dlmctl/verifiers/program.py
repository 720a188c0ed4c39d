"""A program that judges: it reads a record per line and answers each with a verdict on a line.

    {"reward": 0.5, "why": "..."}      or just      0.5

It is started once and asked record by record, so that nothing is read ahead; one that does not
answer in time is killed, and started again for the next record.
"""

from __future__ import annotations

import queue
import shlex
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.records.jsonl import dump
from dlmctl.verifiers.answer import Verdict


class Program:
    """A running judge; stops with `close`, or with this process."""

    def __init__(self, command: str | Sequence[str], time_limit: float) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        self.time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: queue.Queue[bytes] = queue.Queue()

    def __call__(self, record: Mapping[str, Any]) -> Verdict:
        """Its verdict; raises DataError if it gives none, MissingInputError if it is not there."""
        answer = self.ask(dump(record))
        if isinstance(answer, dict) and isinstance(answer.get("reward"), (int, float)):
            detail = {k: v for k, v in answer.items() if k != "reward"}
            return Verdict(float(answer["reward"]), detail)
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            return Verdict(float(answer), {})
        raise DataError(f"{self.command[0]} gave no verdict but {answer!r}; expected a number")

    def ask(self, line: bytes) -> Any:
        """Send one line and wait for the one that answers it."""
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(line)
            process.stdin.flush()
            reply = self._lines.get(timeout=self.time_limit)
        except (BrokenPipeError, queue.Empty) as error:
            self.close()
            if isinstance(error, queue.Empty):
                raise DataError(
                    f"{self.command[0]} gave no verdict within {self.time_limit:g} s "
                    "(does it flush its output after every line?)"
                ) from None
            reply = b""
        if not reply:
            code = self._ended()
            raise DataError(f"{self.command[0]} ended (exit {code}) instead of giving a verdict")
        try:
            return orjson.loads(reply)
        except orjson.JSONDecodeError:
            raise DataError(f"{self.command[0]} said {reply[:80]!r}, which is not JSON") from None

    def close(self) -> None:
        """Stop the program."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ended(self) -> int | None:
        if self._process is None:
            return None
        code = self._process.wait()
        self._process = None
        return code

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            try:
                self._process = subprocess.Popen(
                    self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            except OSError as error:
                raise MissingInputError(
                    f"cannot run {self.command[0]} ({error.strerror})"
                ) from None
            self._lines = queue.Queue()
            threading.Thread(
                target=_read_lines, args=(self._process.stdout, self._lines), daemon=True
            ).start()
        return self._process


def _read_lines(stream: Any, lines: queue.Queue[bytes]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(b"")
