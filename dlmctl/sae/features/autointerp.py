"""Automated interpretability: a judge explains features, and is scored on where they are active.

The protocol of SAEBench and DLM-Scope (arXiv 2602.05859, appendix D): a judge sees windows with the
active tokens marked and says what the feature responds to; then it sees other windows, unmarked,
and says in which the feature is active. If it is right about TP active and TN inactive windows out
of n:

    accuracy            (TP + TN) / n
    balanced accuracy   (TP / active + TN / inactive) / 2

A judge that always answers None has accuracy 10/14 = 0.714 and balanced accuracy 0.5. None of the
windows asked about were shown for the explanation.

A record goes round twice: each call of `advance` takes it from one prompt to the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from dlmctl.diffusion.noise import key_tensor, stream_key, uniform
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field, object_field
from dlmctl.sae.judges import read_numbers, without_thoughts

EXPLAIN, DETECT = "sae-explain", "sae-detect"
SHOWN = {"top": 10, "weighted": 5}
"""Windows that an explanation is made from."""
ASKED = {"top": 2, "weighted": 2}
"""Active windows asked about afterwards, if there are enough; all inactive ones are asked about."""
THRESHOLD = 0.01
"""A token is marked if its activation is above this share of the feature's largest."""
WORDS = 30
"""Longest explanation."""
ANSWERED = ("completion", "tokens", "sample", "rollout", "prompt", "answer", "task")
"""Fields of a prompt and its completion, removed once they have been read."""

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
    """The next prompt about a feature, or its score once both prompts have been answered.

    Raises:
        DataError: it is no record of a feature, the feature was never active, or an answer is
            missing or cannot be read.
    """
    if "judged" in record:
        return record
    windows = field(record, "windows", dict, "'dlmctl sae-features' writes it")
    task = record.get("task")
    try:
        if task not in (EXPLAIN, DETECT):
            return _explain(record, windows, seed)
        answer = field(record, "completion", str, "the judge's answer, by 'dlmctl rollout'")
        return _detect(record, windows, answer, seed) if task == EXPLAIN else _score(record, answer)
    except KeyError as error:
        message = f"field {error} is missing, which 'dlmctl sae-features' writes"
        raise DataError(message, record.where) from None


def _explain(record: Record, windows: Mapping[str, Any], seed: int) -> Record:
    """The prompt that shows active windows and asks for an explanation."""
    asked: dict[str, list[int]] = {}
    for kind, limit in ASKED.items():
        order = _shuffled(len(windows[kind]), seed, _name(record, kind))
        asked[kind] = sorted(order[: min(limit, len(order) // 2)])
    shown = []
    for kind, limit in SHOWN.items():
        others = [window for i, window in enumerate(windows[kind]) if i not in asked[kind]]
        shown += others[:limit]
    if not shown:
        raise DataError(f"feature {record['feature']} was never active: nothing to explain")
    lowest = THRESHOLD * record["max"]
    prompt = EXPLAIN_PROMPT.format(
        masked=_hint(shown), words=WORDS, excerpts=_numbered(excerpt(w, lowest) for w in shown)
    )
    return _with(record, id=_name(record, "explain"), task=EXPLAIN, asked=asked, prompt=prompt)


def _detect(record: Record, windows: Mapping[str, Any], answer: str, seed: int) -> Record:
    """The prompt that shows an explanation and asks in which windows the feature is active."""
    explanation = " ".join(without_thoughts(answer).split()[:WORDS])
    if not explanation:
        raise DataError("the judge gave no explanation")
    active = [windows[kind][i] for kind in ASKED for i in record["asked"][kind]]
    inactive = windows["inactive"]
    if not active or not inactive:
        raise DataError(f"{len(active)} active and {len(inactive)} inactive windows: too few")
    order = _shuffled(len(active) + len(inactive), seed, _name(record, "shuffle"))
    both = [*active, *inactive]
    asked = [both[i] for i in order]
    prompt = DETECT_PROMPT.format(
        explanation=explanation,
        count=len(asked),
        masked=_hint(asked),
        excerpts=_numbered(excerpt(window) for window in asked),
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


def _score(record: Record, answer: str) -> Record:
    """The record with the judge's accuracy in the field `judged`."""
    count, truth = record["answer"]["windows"], set(record["answer"]["active"])
    named = read_numbers(answer, count)
    if named is None:
        raise DataError(f"the judge's answer {answer[:80]!r} is no list of numbers up to {count}")
    judge = object_field(record, "rollout").get("model")
    scores = accuracies(truth, named, count)
    judged = {"judge": judge, "answer": sorted(named), "active": sorted(truth), **scores}
    return _with(record, id=_name(record), judged=judged)


def accuracies(truth: set[int], named: set[int], count: int) -> dict[str, float]:
    """Accuracy and balanced accuracy for windows 1 to `count`, of which `truth` are active."""
    hits, false_alarms = len(truth & named), len(named - truth)
    rejections = count - len(truth) - false_alarms
    balanced = (hits / len(truth) + rejections / (count - len(truth))) / 2
    return {"accuracy": (hits + rejections) / count, "balanced_accuracy": balanced}


def excerpt(window: Mapping[str, Any], lowest: float | None = None) -> str:
    """A window on one line: masked tokens within [[ ]], active ones within << >>.

    Args:
        lowest: activation above which a token is marked as active; None marks none.
    """
    tokens = [
        (masked, lowest is not None and value > lowest, text)
        for masked, value, text in zip(
            window["masked"], window["activations"], window["tokens"], strict=True
        )
    ]
    line = ""
    for masked, run in groupby(tokens, key=lambda token: token[0]):
        part = ""
        for active, inner in groupby(run, key=lambda token: token[1]):
            text = "".join(token[2] for token in inner)
            part += f"<<{text}>>" if active else text
        line += f"[[{part}]]" if masked else part
    return " ".join(line.splitlines())


def _shuffled(count: int, seed: int, name: str) -> list[int]:
    """The numbers below `count` in random order."""
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
    """The record with `fields` in place of the last prompt and its completion."""
    rest = {name: value for name, value in record.items() if name not in ANSWERED}
    changed = Record({**rest, **fields})
    changed.where = record.where
    return changed
