"""Verifier `math`: mathematical equality of LaTeX answers, by the package math-verify.

Judging runs in a process of its own with a time limit, since an expression that a model makes up
can keep a computer algebra system busy for ever.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from typing import Any

from dlmctl.records.errors import DataError, missing_package
from dlmctl.records.jsonl import dump
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.program import Program

TIME_LIMIT = 10.0
"""Seconds for one answer, once the package is loaded."""
START_LIMIT = 120.0

_judge: Program | None = None


def math(record: Mapping[str, Any]) -> Verdict:
    """1 if the answer equals `answer` mathematically.

    Raises:
        UnavailableError: math-verify is not installed.
    """
    wanted = str(required(record, "answer"))
    text, place = answer_text(completion_text(record))
    if text == wanted:
        return judged(True, found_in=place, extracted=text)
    try:
        reply = judge().ask(dump({"answer": wanted, "text": text}))
    except DataError as error:
        return judged(False, str(error.message), found_in=place)
    found = {"found_in": place, "extracted": reply["extracted"]}
    why = "" if reply["correct"] else f"found {reply['extracted']}, wanted {wanted}"
    return judged(reply["correct"], why, **found)


def judge() -> Program:
    """The judging process, started at the first call."""
    global _judge
    if _judge is None:
        if importlib.util.find_spec("math_verify") is None:
            raise missing_package("math-verify", "math", "verifier math")
        _judge = Program([sys.executable, "-m", "dlmctl.verifiers.mathematics"], START_LIMIT)
        _judge.ask(dump({"answer": "1", "text": "1"}))
        _judge.time_limit = TIME_LIMIT
    return _judge


def serve() -> None:
    """The judging process: one question per line in, one answer per line out."""
    import logging

    import orjson
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    for line in sys.stdin.buffer:
        question = orjson.loads(line)
        wanted = parse(f"${question['answer']}$", parsing_timeout=None)
        text = question["text"]
        # A bare answer is LaTeX as well; within prose the package finds its own way.
        given = parse(f"\\boxed{{{text}}}" if len(text) < 200 else text, parsing_timeout=None)
        correct = bool(given) and bool(verify(wanted, given, timeout_seconds=None))
        shown = str(given[-1]) if given else None
        sys.stdout.buffer.write(dump({"correct": correct, "extracted": shown}))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
