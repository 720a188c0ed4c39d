r"""The answer within a completion: in <answer> tags, in \boxed{}, or the whole text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from dlmctl.records.errors import DataError
from dlmctl.tasks.boxes import last_boxed

END_OF_TEXT = re.compile(r"<\|(?:eot_id|endoftext|im_end|end_of_text|eos)\|>|</s>|<eos>")
ANSWER_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL)
EMPTY_BOX = re.compile(r"\\boxed\s*\{\s*\}")


class Verdict(NamedTuple):
    """What a verifier says about one completion."""

    reward: float
    detail: dict[str, Any]
    """What was extracted and why; `correct` says whether the answer is right as a whole."""


def judged(correct: bool, why: str = "", **extracted: Any) -> Verdict:
    """A verdict of 1 or 0; `extracted` and `why`, unless it is empty, are details."""
    return Verdict(
        float(correct), {"correct": correct, **extracted, **({"why": why} if why else {})}
    )


def completion_text(record: Mapping[str, Any]) -> str:
    """The completion up to its first end-of-text token; raises DataError without one."""
    text = record.get("completion")
    if not isinstance(text, str):
        raise DataError("field 'completion' is missing or no text; 'dlmctl rollout' writes it")
    return END_OF_TEXT.split(text, maxsplit=1)[0]


def answer_text(text: str) -> tuple[str, str]:
    """The part of a completion that is its answer, and its place: answer, boxed or text.

    The last pair of tags counts (an unclosed one reaches to the end of the text), and within it the
    last box that is not empty. A blank answer falls back to the last box of the whole text.
    """
    tags = ANSWER_TAG.findall(text)
    region, place = (tags[-1], "answer") if tags else (text, "text")
    region = EMPTY_BOX.sub("", region)
    boxed = last_boxed(region)
    if boxed is None and not region.strip():
        boxed = last_boxed(text)
    return (boxed.strip(), "boxed") if boxed is not None else (region.strip(), place)


def required(record: Mapping[str, Any], name: str) -> Any:
    """A field of the task; raises DataError if it is missing."""
    value = record.get(name)
    if value is None:
        raise DataError(f"field '{name}' is missing; 'dlmctl prompts' writes it for this task")
    return value
