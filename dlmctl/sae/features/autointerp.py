"""Explanations of features by a judge, and how well they tell where a feature is active.

The protocol of SAEBench's and DLM-Scope's automated interpretability (arXiv 2602.05859, appendix
D): a judge sees windows with the active tokens marked and says what the feature responds to; then
it sees other windows, unmarked, and says in which it responds. Of n windows, TP active and TN
inactive ones told rightly:

    accuracy            (TP + TN) / n
    balanced accuracy   (TP / active + TN / inactive) / 2

A judge that always answers None has accuracy 10/14 = 0.714 and balanced accuracy 0.5. The windows
asked about are none of those shown with the explanation.

A record goes round twice: each call of `advance` takes it from one prompt to the next.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field, object_field

EXPLAIN, DETECT = "sae-explain", "sae-detect"
SHOWN = {"top": 10, "weighted": 5}
"""Windows that an explanation is made from."""
ASKED = {"top": 2, "weighted": 2}
"""Active windows asked about afterwards, where there are enough; all inactive ones are too."""
THRESHOLD = 0.01
"""Share of a feature's largest activation from which a token is marked."""
WORDS = 30
"""Longest explanation."""
ANSWERED = ("completion", "tokens", "sample", "rollout", "prompt", "answer", "task")
"""Fields of a prompt and its completion, which go when it has been read."""

EXPLAIN_PROMPT = """\
A detector inside a language model responds to something in a text. Below are excerpts in which it \
responds; the parts that it responds to stand within << and >>. {masked}Say in at most {words} \
words what the detector responds to. Answer with that alone.

{excerpts}

The detector responds to:"""
DETECT_PROMPT = """\
A detector inside a language model responds to the following: {explanation}

Below are {count} excerpts. {masked}In which of them does it respond? Answer with their numbers, \
separated by commas, or with None, and nothing else.

{excerpts}

Answer:"""
MASKED = "What stands within [[ and ]] was hidden from the model, which was to guess it. "


def advance(record: Record, seed: int = 0) -> Record:
    """The next prompt of a feature, or its score where both prompts have been answered.

    Raises:
        DataError: it is no record of a feature, it was never active, or an answer is missing or
            cannot be read.
    """
    if "judged" in record:
        return record
    windows = field(record, "windows", dict, "'dlmctl sae-features' writes it")
    task = record.get("task")
    try:
        if task not in (EXPLAIN, DETECT):
            return _explain(record, windows, seed)
        answer = field(record, "completion", str, "the judge's answer, by 'dlmctl rollout'")
        if task == EXPLAIN:
            return _detect(record, windows, answer, seed)
        return _judged(record, answer)
    except KeyError as error:
        message = f"field {error} is missing, which 'dlmctl sae-features' writes"
        raise DataError(message, record.where) from None


def _explain(record: Record, windows: Mapping[str, Any], seed: int) -> Record:
    asked = {kind: _asked(record, kind, windows, seed) for kind in ASKED}
    shown = [
        window
        for kind, limit in SHOWN.items()
        for window in _without(windows[kind], asked[kind])[:limit]
    ]
    if not shown:
        raise DataError(f"feature {record['feature']} was never active: nothing to explain")
    least = THRESHOLD * record["max"]
    prompt = EXPLAIN_PROMPT.format(
        masked=_hint(shown), words=WORDS, excerpts=_numbered(excerpt(w, least) for w in shown)
    )
    return _with(record, id=_name(record, "explain"), task=EXPLAIN, asked=asked, prompt=prompt)


def _detect(record: Record, windows: Mapping[str, Any], answer: str, seed: int) -> Record:
    explanation = " ".join(answer.split()[:WORDS])
    if not explanation:
        raise DataError("the judge gave no explanation")
    active = [windows[kind][i] for kind in ASKED for i in record["asked"][kind]]
    inactive = windows["inactive"]
    if not active or not inactive:
        raise DataError(f"{len(active)} active and {len(inactive)} inactive windows: too few")
    order = _order(len(active) + len(inactive), seed, _name(record, "shuffle"))
    both = [*active, *inactive]
    shuffled = [both[i] for i in order]
    prompt = DETECT_PROMPT.format(
        explanation=explanation,
        count=len(shuffled),
        masked=_hint(shuffled),
        excerpts=_numbered(excerpt(window) for window in shuffled),
    )
    return _with(
        record,
        id=_name(record, "detect"),
        task=DETECT,
        explanation=explanation,
        prompt=prompt,
        answer={
            "active": [place + 1 for place, i in enumerate(order) if i < len(active)],
            "windows": len(order),
        },
    )


def _judged(record: Record, text: str) -> Record:
    count, truth = record["answer"]["windows"], set(record["answer"]["active"])
    found = parse_numbers(text, count)
    if found is None:
        raise DataError(f"the judge's answer {text[:80]!r} is no list of numbers up to {count}")
    judge = object_field(record, "rollout").get("model")
    scores = accuracies(truth, found, count)
    told = {"judge": judge, "answer": sorted(found), "active": sorted(truth), **scores}
    return _with(record, id=_name(record), judged=told)


def accuracies(truth: set[int], found: set[int], count: int) -> dict[str, float]:
    """Accuracy and balanced accuracy for windows 1 to `count`, those of `truth` active."""
    hits, false_alarms = len(truth & found), len(found - truth)
    rejections = count - len(truth) - false_alarms
    balanced = (hits / len(truth) + rejections / (count - len(truth))) / 2
    return {"accuracy": (hits + rejections) / count, "balanced_accuracy": balanced}


def parse_numbers(text: str, count: int) -> set[int] | None:
    """The numbers from 1 to `count` in a judge's answer; None where it is no such list.

    The first line that is a list of numbers, or None, is the answer, what stands before a colon
    aside. A sentence with numbers in it is not taken for one.
    """
    for line in text.splitlines():
        said = line.rpartition(":")[2].strip(" .*[]()").lower()
        if re.fullmatch(r"none\b\D*", said):
            return set()
        if re.fullmatch(r"\d{1,9}((\s*,\s*(and\s+)?|\s+and\s+|\s+)\d{1,9})*", said, re.ASCII):
            numbers = set(map(int, re.findall(r"\d+", said)))
            return numbers if numbers <= set(range(1, count + 1)) else None
    return None


def excerpt(window: Mapping[str, Any], least: float | None = None) -> str:
    """A window on one line, what was masked within [[ ]] and, from `least` on, what is active
    within << >>; nothing is marked as active where `least` is None."""
    marked = [
        (masked, least is not None and value > least, text)
        for masked, value, text in zip(
            window["masked"], window["activations"], window["tokens"], strict=True
        )
    ]
    line = ""
    for masked, run in groupby(marked, key=lambda token: token[0]):
        part = ""
        for active, inner in groupby(run, key=lambda token: token[1]):
            text = "".join(token[2] for token in inner)
            part += f"<<{text}>>" if active else text
        line += f"[[{part}]]" if masked else part
    return " ".join(line.splitlines())


def _asked(record: Record, kind: str, windows: Mapping[str, Any], seed: int) -> list[int]:
    """Numbers of the windows of a kind that are kept for the second prompt."""
    count = len(windows[kind])
    return sorted(_order(count, seed, _name(record, kind))[: min(ASKED[kind], count // 2)])


def _without(windows: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
    return [window for i, window in enumerate(windows) if i not in numbers]


def _order(count: int, seed: int, name: str) -> list[int]:
    """The numbers below `count` shuffled."""
    keys = key_tensor([stream_key(seed, name, i) for i in range(count)])
    order: list[int] = uniform(keys, keys * 0).argsort(stable=True).tolist()
    return order


def _hint(windows: Iterable[Mapping[str, Any]]) -> str:
    return MASKED if any(any(window["masked"]) for window in windows) else ""


def _numbered(lines: Iterable[str]) -> str:
    return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def _name(record: Record, step: str = "") -> str:
    name = f"{record.get('sae', '')}/{record['feature']}"
    return f"{name}/{step}" if step else name


def _with(record: Record, **fields: Any) -> Record:
    """The record with other fields in place of those of the last prompt, its id ahead."""
    rest = {name: value for name, value in record.items() if name not in ANSWERED}
    made = Record({**rest, **fields})
    made.where = record.where
    return made
