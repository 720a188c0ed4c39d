"""Limits on the time of verifiers, so that no completion keeps `verify` busy for ever.

The built-in verifiers take time that is linear in the completion; an alarm stops them all the same.
An alarm does not interrupt a call of C, so that functions of others (`module:function`, entry
points) and computer algebra run in a process of their own, which is killed, with what it started,
if a record takes too long.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Mapping
from typing import Any

import orjson

from dlmctl.records import errors
from dlmctl.records.errors import DataError, UserFacingError
from dlmctl.records.jsonl import dump, located
from dlmctl.verifiers.answer import Verdict, judged
from dlmctl.verifiers.program import OverrunError, Program

START_LIMIT = 600.0
"""Seconds for the import of a function, which may load a model."""


class TookTooLongError(Exception):
    """The alarm went off."""


class Alarm:
    """Raises TookTooLongError in what runs under it (`with alarm:`) after this many seconds.

    Only the main thread has signals; elsewhere there is no limit. Regular expressions check for
    signals as they go, a single operation on huge numbers does not. The handler is installed until
    `close`: setting it for each record would double the cost of a record.
    """

    def __init__(self, seconds: float) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._seconds = seconds if main else None
        if self._seconds is not None:
            self._before = signal.signal(signal.SIGALRM, _stop)

    def __enter__(self) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)

    def __exit__(self, *error: object) -> None:
        if self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, 0.0)

    def close(self) -> None:
        """Restore the handler that was there before."""
        if self._seconds is not None:
            signal.signal(signal.SIGALRM, self._before)


def _stop(signum: int, frame: Any) -> None:
    raise TookTooLongError


def overrun(seconds: float) -> Verdict:
    """The verdict on a completion that took too long to judge: that of a wrong answer."""
    return judged(False, f"took longer than {seconds:g} s")


class Worker:
    """A verifier in a process of its own.

    Args:
        name: `module:function`, or the name of an entry point.
        time_limit: seconds for one record; the import has START_LIMIT.
        memory: bytes of address space, or None.

    Raises:
        UsageError: there is no such verifier.
    """

    def __init__(self, name: str, time_limit: float, memory: int | None = None) -> None:
        self.name, self.time_limit = name, time_limit
        command = [sys.executable, "-m", "dlmctl.verifiers.limits"]
        self._program = Program(command, START_LIMIT, memory)
        self._warned = False
        self.start()

    def __call__(self, record: Mapping[str, Any]) -> Verdict:
        """Its verdict, 0 after the time limit; raises DataError if it fails."""
        where = getattr(record, "where", "")
        try:
            return self.ask(record, self.time_limit)
        except OverrunError:
            if not self._warned:
                print(
                    f"dlmctl: {where + ': ' if where else ''}{self.name} took longer than "
                    f"{self.time_limit:g} s and its reward is 0, as of others that do "
                    "(--time-limit)",
                    file=sys.stderr,
                )
                self._warned = True
            return overrun(self.time_limit)

    def ask(self, record: Mapping[str, Any], time_limit: float) -> Verdict:
        """Its verdict; raises OverrunError after `time_limit` seconds, DataError if it fails."""
        self.start()
        self._program.time_limit = time_limit
        where = getattr(record, "where", "")
        try:
            asked = {"record": record, "where": where, "seconds": time_limit}
            answer = self._program.ask(dump(asked))
        except OverrunError:
            raise
        except DataError as error:
            raise DataError(
                f"the process of verifier {self.name} failed: {error.message}"
            ) from None
        return self._verdict(answer)

    def start(self) -> None:
        """Start the process and import the verifier, unless it runs."""
        if not self._program.running:
            self._program.time_limit = START_LIMIT
            self._verdict(self._program.ask(dump({"name": self.name, "path": sys.path})))

    def close(self) -> None:
        """Stop the process."""
        self._program.close()

    def _verdict(self, answer: Mapping[str, Any]) -> Verdict:
        if "error" in answer:
            kind = getattr(errors, answer["error"], DataError)
            raise kind(answer["message"])
        if answer["reward"] is None:
            raise DataError(f"verifier {self.name} gave no finite number")
        return Verdict(answer["reward"], answer["detail"])


def serve() -> None:
    """The process of a Worker: reads the name of a verifier, then records, and answers each."""
    from dlmctl.verifiers.registry import ask, find_verifier

    # What the verifier prints goes to standard error: standard output is for the answers.
    answers = io.FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    first = orjson.loads(sys.stdin.buffer.readline())
    sys.path[:] = first["path"]
    importlib.invalidate_caches()
    try:
        verifier = find_verifier(first["name"])
    except UserFacingError as error:
        answers.write(_failure(error))
        return
    answers.write(dump({"reward": 0.0, "detail": {}}))
    # The default action ends this process even within a call of C, and even if whoever asked was
    # killed and nobody waits any more.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        asked = orjson.loads(line)
        record = located(asked["record"], asked["where"])
        signal.setitimer(signal.ITIMER_REAL, asked["seconds"] + 5.0)
        try:
            verdict = ask(verifier, record)
            answer = dump({"reward": verdict.reward, "detail": verdict.detail})
        except UserFacingError as error:
            answer = _failure(error)
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer = _failure(DataError(f"verifier {first['name']} failed: {error!r:.200}"))
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        written = 0
        while written < len(answer):
            written += answers.write(answer[written:])


def _failure(error: UserFacingError) -> bytes:
    message = error.message if isinstance(error, DataError) else str(error)
    return dump({"error": type(error).__name__, "message": message})


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        serve()
