"""Matching by the package regex; only the process of verifier `regex` imports it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import regex

LONGEST_SHOWN = 200
"""Most characters of what was matched."""


def match(asked: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """1 if `text` matches `pattern`, with what was matched; else why not, or why it is none."""
    try:
        return _match(asked)
    except MemoryError:  # some patterns are large when they are compiled, as a{1000000000}
        return 0.0, {"overrun": "more memory than it may"}


def _match(asked: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    try:
        compiled = _compiled(asked["pattern"])
    except (regex.error, RecursionError, OverflowError) as error:
        return 0.0, {"invalid": str(error)[:LONGEST_SHOWN] or type(error).__name__}
    whole, text = asked["match"] == "full", asked["text"]
    find = compiled.fullmatch if whole else compiled.search
    try:
        found = find(text.strip() if whole else text, timeout=asked["seconds"])
    except TimeoutError:
        return 0.0, {"overrun": "longer than it may"}
    return float(found is not None), {"matched": found.group()[:LONGEST_SHOWN] if found else None}


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)
