"""A baseline that does not look at the image: the most frequent answer for a prompt.

It comes from training records and is scored on test records. A model that does no better has not
used the images.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dlmctl.records.jsonl import Record

IMAGE_FREE = "image_free"
"""Field of a record: 1 if that answer is right."""


def frequent_answers(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Prompt to its most frequent answer; the empty prompt to the one of all records."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        for key in (_prompt(record), ""):
            counts[key][_answer(record)] += 1
    return {key: count.most_common(1)[0][0] for key, count in counts.items()}


def with_image_free(records: Iterable[Record], answers: Mapping[str, str]) -> Iterator[Record]:
    """Records with the field IMAGE_FREE; an unknown prompt gets the answer of all records."""
    for record in records:
        guess = answers.get(_prompt(record), answers.get(""))
        record[IMAGE_FREE] = float(guess == _answer(record))
        yield record


def _prompt(record: Mapping[str, Any]) -> str:
    return str(record.get("prompt") or record.get("messages"))


def _answer(record: Mapping[str, Any]) -> str:
    """The answer, or the most frequent of several references."""
    answers = record.get("answers")
    if not isinstance(answers, list) or not answers:
        return str(record.get("answer"))
    texts = [str(a.get("answer")) if isinstance(a, dict) else str(a) for a in answers]
    return Counter(texts).most_common(1)[0][0]
