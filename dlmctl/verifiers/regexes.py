"""Verifier `regex`: a regular expression that the completion matches.

    pattern    the expression, in the syntax of the package regex, which has that of Python's re
    match      "search" (somewhere in the text) or "full" (all of it but white space at its ends)

A record's own fields count before the options --pattern and --match. Matching runs in a process of
its own with limits on time and memory, which is killed if they are not enough: the time limit of
the package itself is checked too rarely while an expression recurses, and none limits compilation.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from typing import Any

from dlmctl.records.errors import DataError, UnavailableError
from dlmctl.settings.verify import Matching
from dlmctl.verifiers.answer import Verdict, completion_text, judged
from dlmctl.verifiers.limits import Worker
from dlmctl.verifiers.program import OverrunError

TIME_LIMIT = 10.0
MEMORY_LIMIT = 1 << 30
"""Bytes of address space of the matching process."""
LONGEST_PATTERN = 10_000


def regex(
    record: Mapping[str, Any], time_limit: float = TIME_LIMIT, matching: Matching = Matching()
) -> Verdict:
    """1 if the completion matches; 0 if matching takes longer, or more memory, than it may.

    Args:
        time_limit: seconds.
        matching: the pattern and the kind of match for records that have none.

    Raises:
        DataError: there is no pattern, or it is no regular expression.
    """
    pattern, kind = record.get("pattern", matching.pattern), record.get("match", matching.match)
    if not isinstance(pattern, str):
        raise DataError("there is no pattern: give field 'pattern', or --pattern REGEX")
    if len(pattern) > LONGEST_PATTERN:
        raise DataError(f"the pattern has {len(pattern)} characters, at most {LONGEST_PATTERN}")
    if kind not in ("search", "full"):
        raise DataError(f"field 'match' is {str(kind)[:80]!r}, expected search or full")
    text = completion_text(record)
    # Stopping by the package's own limit, where it works, saves the start of another process.
    asked = {"pattern": pattern, "match": kind, "text": text, "seconds": 0.9 * time_limit}
    try:
        verdict = _judge().ask(asked, time_limit)
    except OverrunError:
        return judged(False, f"took longer than {time_limit:g} s")
    except DataError as error:
        return judged(False, error.message)
    if "invalid" in verdict.detail:
        raise DataError(f"the pattern is no regular expression ({verdict.detail['invalid']})")
    if overrun := verdict.detail.get("overrun"):
        return judged(False, f"took {overrun}")
    return judged(verdict.reward == 1.0, **verdict.detail)


def _judge() -> Worker:
    if importlib.util.find_spec("regex") is None:
        raise UnavailableError("verifier regex needs the package regex: run  pip install regex")
    worker = _worker()
    worker.start()
    return worker


@cache
def _worker() -> Worker:
    return Worker("dlmctl.verifiers.regex_matching:match", TIME_LIMIT, MEMORY_LIMIT)
