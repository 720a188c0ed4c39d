"""Verifier `math`: mathematical equality of LaTeX answers, by the package math-verify.

Judging runs in a process of its own with limits on time and memory: an expression that a model
makes up, such as 9**9**9**9, can keep a computer algebra system busy for ever.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

from dlmctl.records.errors import DataError, missing_package
from dlmctl.verifiers.answer import Verdict, answer_text, completion_text, judged, required
from dlmctl.verifiers.limits import Worker
from dlmctl.verifiers.program import OverrunError
from dlmctl.verifiers.typography import plain

TIME_LIMIT = 10.0
"""Seconds for one answer, once the package is loaded."""
MEMORY_LIMIT = 4 << 30
"""Bytes of address space of the judging process."""
LONGEST_SHOWN = 200
"""Most characters of what was extracted."""


def math(record: Mapping[str, Any], time_limit: float = TIME_LIMIT) -> Verdict:
    """1 if the answer equals `answer` mathematically; 0 if judging takes longer.

    Args:
        time_limit: seconds.

    Raises:
        UnavailableError: math-verify is not installed.
    """
    wanted = str(required(record, "answer"))
    text, place = answer_text(completion_text(record))
    if text == wanted:
        return judged(True, found_in=place, extracted=text[:LONGEST_SHOWN])
    pair = {"answer": plain(wanted), "text": plain(text)}
    try:
        verdict = judge().ask(pair, time_limit)
    except OverrunError:
        return judged(False, f"took longer than {time_limit:g} s", found_in=place)
    except DataError as error:
        return judged(False, error.message, found_in=place)
    if "error" in verdict.detail:
        return judged(False, f"cannot be judged ({verdict.detail['error']})", found_in=place)
    correct, extracted = verdict.reward == 1.0, verdict.detail["extracted"]
    why = "" if correct else f"found {extracted}, wanted {wanted}"
    return judged(correct, why, found_in=place, extracted=extracted)


def judge() -> Worker:
    """The judging process, with the package loaded; loading has a time limit of its own."""
    if importlib.util.find_spec("math_verify") is None:
        raise missing_package("math-verify", "math", "verifier math")
    worker = _worker()
    worker.start()
    return worker


@cache
def _worker() -> Worker:
    return Worker("dlmctl.verifiers.symbolic:equal", TIME_LIMIT, MEMORY_LIMIT)
