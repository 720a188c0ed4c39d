r"""The shaped rewards of d1 (arXiv 2504.12216) as its code computes them, without its bugs.

What differs: \boxed is matched as it is written (the code of d1 has a backspace there, which never
matches); Countdown is parsed instead of passed to `eval`; a prefilled <reasoning> counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.verifiers.answer import ANSWER_TAG, Verdict, answer_text, completion_text
from dlmctl.verifiers.countdown import countdown
from dlmctl.verifiers.numeric import parse_number
from dlmctl.verifiers.texts import BETWEEN


def tags_count(record: Mapping[str, Any]) -> Verdict:
    """An eighth for each of the four tags on a line of its own, less 0.001 per character behind."""
    text = completion_text(record)
    tags = ("<reasoning>\n", "\n</reasoning>\n", "\n<answer>\n", "\n</answer>")
    matched = [tag.strip() for tag in tags if text.count(tag) == 1]
    behind = len(text.rpartition("</answer>")[2].strip()) if "</answer>" in matched else 0
    return Verdict(0.125 * len(matched) - 0.001 * behind, {"tags": matched, "behind": behind})


def tags_soft(record: Mapping[str, Any]) -> Verdict:
    """1 if there are a reasoning block and, behind it, an answer block."""
    _, opened, rest = completion_text(record).partition("<reasoning>")
    middle = BETWEEN.search(rest)
    matches = opened and middle is not None and "</answer>" in rest[middle.end() :]
    return Verdict(float(bool(matches)), {})


def tags_strict(record: Mapping[str, Any]) -> Verdict:
    """1 if the completion is the two blocks alone, tags on lines of their own."""
    text = completion_text(record).removesuffix("\n")
    begin, between, end = "<reasoning>\n", "\n</reasoning>\n<answer>\n", "\n</answer>"
    middle = text.find(between, len(begin))
    fits = middle >= 0 and middle + len(between) <= len(text) - len(end)
    return Verdict(float(fits and text.startswith(begin) and text.endswith(end)), {})


def integer(record: Mapping[str, Any]) -> Verdict:
    """1 if the answer is a whole number and nothing else."""
    text, _ = answer_text(completion_text(record))
    return Verdict(float(text.isdecimal() and parse_number(text) is not None), {})


def boxed_tags(record: Mapping[str, Any]) -> Verdict:
    r"""Answer tags and \boxed 1; tags 0.75; \boxed 0.5; neither 0.25."""
    text = completion_text(record)
    tags, boxed = ANSWER_TAG.search(text) is not None, "\\boxed" in text
    return Verdict(
        {(True, True): 1.0, (True, False): 0.75, (False, True): 0.5}.get((tags, boxed), 0.25), {}
    )


def countdown_shaped(record: Mapping[str, Any]) -> Verdict:
    """1 if right, 0.1 for an answer that is wrong, 0 without <answer>."""
    verdict = countdown(record)
    tagged = ANSWER_TAG.search(completion_text(record)) is not None
    return Verdict(verdict.reward if verdict.reward else 0.1 * tagged, verdict.detail)
