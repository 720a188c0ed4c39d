"""A program that judges: it reads a record per line, and answers each with a verdict on a line.

    {"reward": 0.5, "why": "..."}      or just      0.5

It is started once and asked record by record, so that nothing is read ahead. If it does not answer
in time, it is killed with what it started, and started again for the next record. Its output is
read only during a question, and no further than a line, so that a flood stays in its own pipe.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from dlmctl.records.errors import DataError, MissingInputError
from dlmctl.records.jsonl import dump
from dlmctl.verifiers.answer import Verdict

LONGEST_LINE = 1 << 20
"""Most bytes of a verdict."""
CHUNK = 1 << 16


class OverrunError(DataError):
    """There was no verdict within the time limit."""


class Program:
    """A running judge; stops with `close`.

    Args:
        command: a line, which is split as a shell splits it, or its words.
        time_limit: seconds for one record.
        memory_limit: bytes of address space for each of its processes (RLIMIT_AS), or None.
    """

    def __init__(
        self, command: str | Sequence[str], time_limit: float, memory_limit: int | None = None
    ) -> None:
        self.command = shlex.split(command) if isinstance(command, str) else list(command)
        self.time_limit = time_limit
        self.memory_limit = memory_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._output = bytearray()

    def __call__(self, record: Mapping[str, Any]) -> Verdict:
        """Its verdict; raises DataError without one, MissingInputError if it cannot be started."""
        answer = self.ask(dump(record))
        if isinstance(answer, dict) and isinstance(answer.get("reward"), (int, float)):
            detail = {k: v for k, v in answer.items() if k != "reward"}
            return Verdict(float(answer["reward"]), detail)
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            return Verdict(float(answer), {})
        shown = repr(answer)[:80]
        raise DataError(f"{self.command[0]} gave no verdict but {shown}; expected a number")

    def ask(self, line: bytes) -> Any:
        """Send one line and wait for the answer.

        Raises:
            OverrunError: it took longer than the time limit.
            DataError: it ended, or its answer is too long or no JSON.
        """
        process = self._running()
        try:
            reply = self._exchange(process, line)
        except BaseException:
            self.close()
            raise
        if not reply:
            raise DataError(self._ended())
        try:
            return orjson.loads(reply)
        except orjson.JSONDecodeError:
            raise DataError(f"{self.command[0]} said {reply[:80]!r}, which is not JSON") from None

    @property
    def running(self) -> bool:
        """Whether it has been started and not stopped."""
        return self._process is not None

    def close(self) -> None:
        """Stop the program, and what it started in its session."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def _exchange(self, process: subprocess.Popen[bytes], line: bytes) -> bytes:
        """The line that answers `line`; empty if the program ends instead."""
        assert process.stdin is not None
        assert process.stdout is not None
        end = time.monotonic() + self.time_limit
        left, searched = memoryview(line), 0
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdin, selectors.EVENT_WRITE)
            selector.register(process.stdout, selectors.EVENT_READ)
            while True:
                found = self._output.find(b"\n", searched)
                # A verdict that comes before its record is sent waits.
                if found >= 0 and not left:
                    reply = bytes(self._output[: found + 1])
                    del self._output[: found + 1]
                    return reply
                searched = len(self._output) if found < 0 else found
                if len(self._output) > LONGEST_LINE and (found < 0 or found > LONGEST_LINE):
                    raise DataError(
                        f"{self.command[0]} said more than {LONGEST_LINE} bytes without an end of "
                        "line; a verdict is one short line"
                    )
                # Read no more than needed: the rest of a flood stays in the pipe.
                reads = len(self._output) <= LONGEST_LINE
                ready = selector.select(end - time.monotonic())
                if not ready and time.monotonic() >= end:
                    raise OverrunError(
                        f"{self.command[0]} gave no verdict within {self.time_limit:g} s "
                        "(does it flush its output after every line?)"
                    )
                for key, _ in ready:
                    if key.fileobj is process.stdout:
                        if not reads:
                            selector.unregister(process.stdout)
                            continue
                        block = os.read(key.fd, CHUNK)
                        if not block:
                            return b""
                        self._output += block
                        continue
                    try:
                        left = left[os.write(key.fd, left) :]
                    except BlockingIOError:
                        continue
                    except BrokenPipeError:
                        left = left[:0]
                    if not left:
                        selector.unregister(process.stdin)

    def _ended(self) -> str:
        """The message for a program that closed its output; stops it if it still runs."""
        assert self._process is not None
        try:
            code: int | None = self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        how = "closed its output" if code is None else f"ended (exit {code})"
        limit = f" (--memory-limit is {self.memory_limit} bytes)" if self.memory_limit else ""
        return f"{self.command[0]} {how} instead of giving a verdict{limit}"

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._output.clear()
            try:
                # A session of its own, so that what the program starts is stopped with it.
                self._process = subprocess.Popen(
                    self._limited(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    bufsize=0,
                    start_new_session=True,
                )
            except OSError as error:
                raise MissingInputError(
                    f"cannot run {self.command[0]} ({error.strerror})"
                ) from None
            assert self._process.stdin is not None
            os.set_blocking(self._process.stdin.fileno(), False)
        return self._process

    def _limited(self) -> list[str]:
        """The command, with its memory limit set by a shell that becomes the program.

        The limit is set before the program's first instruction, without code between fork and exec.
        """
        if self.memory_limit is None:
            return self.command
        if shutil.which(self.command[0]) is None:
            raise MissingInputError(f"cannot run {self.command[0]} (No such file or directory)")
        kibibytes = str(max(1, self.memory_limit // 1024))
        return ["/bin/sh", "-c", 'ulimit -v "$0" && exec "$@"', kibibytes, *self.command]
