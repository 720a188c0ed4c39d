"""Equality of two LaTeX expressions by math-verify; only the process of verifier `math` imports it.

The package, and its parser, are loaded on import, which has a time limit of its own.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from math_verify import parse, verify

from dlmctl.verifiers.mathematics import LONGEST_SHOWN

logging.disable(logging.CRITICAL)
warnings.simplefilter("ignore")


def equal(pair: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """1 if `text` equals `answer`, and what was extracted from it, or the error."""
    answer, text = pair["answer"], pair["text"]
    try:
        wanted = parse(f"${answer}$", parsing_timeout=None)
        # A bare answer is LaTeX as well; within prose the package finds its own way.
        given = parse(f"\\boxed{{{text}}}" if len(text) < 200 else text, parsing_timeout=None)
        correct = bool(given) and bool(verify(wanted, given, timeout_seconds=None))
        shown = str(given[-1])[:LONGEST_SHOWN] if given else None
    except Exception as error:  # the package raises whatever its parts do
        return 0.0, {"error": type(error).__name__}
    return float(correct), {"extracted": shown}


equal({"answer": "1", "text": "1"})
