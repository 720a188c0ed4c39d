"""Language models as judges: how one is asked here, and how its answers are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.models.loading import load_policy
from dlmctl.records.jsonl import OnError, Record
from dlmctl.settings.compute import Compute
from dlmctl.settings.sampler import Sampler

_NUMBER = r"-?\d+(?:\.\d+)?(?![\w/]|[.,]\d)"
_SCALE = re.compile(r"\b0\s*(?:-|–|to|and|through)\s*100\b|(?:/|\bout\s+of)\s*100\b|%", re.I)
_ALONE = re.compile(rf"[\s*_\"'`]*({_NUMBER})[\s*_\"'`.]*")
_LABELLED = re.compile(
    rf"\b(?:score|rating|answer)[\s:=*_\"'`]*(?:(?:is|of)\s*)?[\s:=*_\"'`]*({_NUMBER})", re.I
)
_ANY = re.compile(rf"(?<![\w.,/])({_NUMBER})")


def judge_model(
    model: str, length: int, compute: Compute, seed: int = 0, on_error: OnError = "keep"
) -> Callable[[Iterable[Record]], Iterator[Record]]:
    """A function that has a model answer prompt records, greedily, in at most `length` tokens."""
    policy = load_policy(model, compute.device, compute.dtype)
    settings = configured(policy, Sampler(gen_length=length, temperature=0.0))
    return lambda asked: rollout(asked, policy, settings, 1, seed, compute.batch_size, on_error)


def without_thoughts(answer: str) -> str:
    """An answer without what stands from `<think>` to `</think>`, or to the end."""
    return answer.rpartition("</think>")[2].partition("<think>")[0]


def read_score(answer: str) -> float | None:
    """The number from 0 to 100 that an answer gives; None unless it gives exactly one.

    It is the first line if that is nothing but a number, else the only number called a score, else
    the only number of the answer. Thoughts do not count, nor does what names the scale ("/100",
    "0 to 100", "%").
    """
    answer = _SCALE.sub(" ", without_thoughts(answer)).strip()
    first = _ALONE.fullmatch(answer.partition("\n")[0])
    for numbers in ([first[1]] if first else [], _LABELLED.findall(answer), _ANY.findall(answer)):
        values = set(map(float, numbers))
        if len(values) == 1 and 0 <= (value := values.pop()) <= 100:
            return value
        if numbers:
            return None
    return None


def read_numbers(answer: str, count: int) -> set[int] | None:
    """The numbers from 1 to `count` that an answer lists; None if it contains no such list.

    The answer is the first line that is a list of numbers or the word None, whatever stands before
    a colon left out. A sentence that contains numbers is no list. Thoughts do not count.
    """
    for line in without_thoughts(answer).splitlines():
        text = line.rpartition(":")[2].strip(" .*[]()").lower()
        if re.fullmatch(r"none\b\D*", text):
            return set()
        if re.fullmatch(r"\d{1,9}((\s*,\s*(and\s+)?|\s+and\s+|\s+)\d{1,9})*", text, re.ASCII):
            numbers = set(map(int, re.findall(r"\d+", text)))
            return numbers if numbers <= set(range(1, count + 1)) else None
    return None
