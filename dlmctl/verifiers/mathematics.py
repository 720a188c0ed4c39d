"""Verifier `math`: mathematical equality of LaTeX answers, by the package math-verify.

Judging runs in a process of its own with limits on time and memory, since an expression that a
model makes up, as 9**9**9**9, can keep a computer algebra system busy for ever.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any

from dlmctl.records.errors import DataError, missing_package
from dlmctl.records.jsonl import dump
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.program import OverrunError, Program
from dlmctl.verifiers.typography import plain

TIME_LIMIT = 10.0
"""Seconds for one answer, once the package is loaded."""
START_LIMIT = 120.0
MEMORY_LIMIT = 4 << 30
"""Bytes of address space of the judging process."""
LONGEST_SHOWN = 200
"""Characters of what was extracted."""

_judge: Program | None = None


def math(record: Mapping[str, Any], time_limit: float = TIME_LIMIT) -> Verdict:
    """1 if the answer equals `answer` mathematically; 0 where judging takes longer.

    Args:
        time_limit: seconds.

    Raises:
        UnavailableError: math-verify is not installed.
    """
    wanted = str(required(record, "answer"))
    text, place = answer_text(completion_text(record))
    if text == wanted:
        return judged(True, found_in=place, extracted=text[:LONGEST_SHOWN])
    program = judge()
    program.time_limit = time_limit
    try:
        reply = program.ask(
            dump({"answer": plain(wanted), "text": plain(text), "seconds": time_limit})
        )
    except OverrunError:
        return judged(False, f"took longer than {time_limit:g} s", found_in=place)
    except DataError as error:
        return judged(False, str(error.message), found_in=place)
    if "error" in reply:
        return judged(False, f"cannot be judged ({reply['error']})", found_in=place)
    found = {"found_in": place, "extracted": reply["extracted"]}
    why = "" if reply["correct"] else f"found {reply['extracted']}, wanted {wanted}"
    return judged(reply["correct"], why, **found)


def judge() -> Program:
    """The judging process, with the package loaded, for which there is time apart."""
    global _judge
    if _judge is None:
        if importlib.util.find_spec("math_verify") is None:
            raise missing_package("math-verify", "math", "verifier math")
        command = [sys.executable, "-m", "dlmctl.verifiers.mathematics"]
        _judge = Program(command, START_LIMIT, MEMORY_LIMIT)
    if not _judge.running:
        _judge.time_limit = START_LIMIT
        _judge.ask(dump({"answer": "1", "text": "1", "seconds": START_LIMIT}))
    return _judge


def serve() -> None:
    """The judging process: one question per line in, one answer per line out."""
    import logging

    import orjson

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    # By its default action the alarm ends the process even within a call of C, and so also where
    # who asked was killed and nobody waits any more.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for line in sys.stdin.buffer:
        question = orjson.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["seconds"] + 5.0)
        try:
            answer = _compare(question["answer"], question["text"])
        except Exception as error:  # the package raises whatever its parts do
            answer = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        try:
            sys.stdout.buffer.write(dump(answer))
            sys.stdout.buffer.flush()
        except BrokenPipeError:
            os._exit(0)


def _compare(answer: str, text: str) -> dict[str, Any]:
    from math_verify import parse, verify

    wanted = parse(f"${answer}$", parsing_timeout=None)
    # A bare answer is LaTeX as well; within prose the package finds its own way.
    given = parse(f"\\boxed{{{text}}}" if len(text) < 200 else text, parsing_timeout=None)
    correct = bool(given) and bool(verify(wanted, given, timeout_seconds=None))
    shown = str(given[-1])[:LONGEST_SHOWN] if given else None
    return {"correct": correct, "extracted": shown}


if __name__ == "__main__":
    serve()
