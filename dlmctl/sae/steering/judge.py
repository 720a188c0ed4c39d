"""A judge of concepts: questions as records, and the numbers in its answers.

A question is a prompt record that any language model, or any other program, can answer; its field
`judged` says which text it is about. A text is judged alone, without its prompt, so that the judge
does not see which of two is steered; an unsteered one is judged once for each concept, whatever the
number of amplitudes. Answers are records with `judged` and `completion`, or with `score` (0..100).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field
from dlmctl.sae.steering.scores import Key, Pair, Text, Treatment

QUESTION = """\
Below are a concept and a text.

Concept: {concept}

Text:
{text}

How strongly does the text express the concept? Answer with one whole number from 0 (not at all) \
to 100 (as strongly as a text can), and with nothing else.
"""

NAMES = ("sae", "layer", "feature", "amplitude", "scope", "time")
"""Fields that say what a score is about, beside `id` and `sample`."""

_NUMBER = r"-?\d+(?:\.\d+)?(?![\w/]|[.,]\d)"
_SCALE = re.compile(r"\b0\s*(?:-|–|to|and|through)\s*100\b|(?:/|\bout\s+of)\s*100\b|%", re.I)
_ALONE = re.compile(rf"[\s*_\"'`]*({_NUMBER})[\s*_\"'`.]*")
_LABELLED = re.compile(
    rf"\b(?:score|rating|answer)[\s:=*_\"'`]*(?:(?:is|of)\s*)?[\s:=*_\"'`]*({_NUMBER})", re.I
)
_ANY = re.compile(rf"(?<![\w.,/])({_NUMBER})")


def about(text: Text, treatment: Treatment) -> dict[str, Any]:
    """What a score of this text under the concept of this feature is about."""
    steered = treatment.fields()
    names = NAMES if text.treatment is not None else NAMES[:3]
    return {"id": text.key[0], "sample": text.key[1], **{name: steered[name] for name in names}}


def explanations(records: Iterable[Record], where: str) -> Callable[[Treatment], str]:
    """The concepts of features, from records of a file with `feature` and `explanation`.

    Records may narrow what they are about by `sae` and `layer`. The function raises DataError for a
    feature that has none.
    """
    known: dict[int, list[tuple[Record, str]]] = {}
    for record in records:
        explanation = field(record, "explanation", str, "what the feature stands for")
        known.setdefault(field(record, "feature", int), []).append((record, explanation))

    def find(treatment: Treatment) -> str:
        wanted = treatment.fields()
        for record, explanation in known.get(treatment.feature, []):
            if all(record.get(name, wanted[name]) == wanted[name] for name in NAMES[:3]):
                return explanation
        raise DataError(f"no explanation of feature {treatment.feature} of {treatment.sae}", where)

    return find


def questions(pairs: Iterable[Pair], concept: Callable[[Treatment], str]) -> Iterator[Record]:
    """A prompt record for each text and concept."""
    asked = set()
    for pair in pairs:
        for text in (pair.before, pair.after):
            name = text.key, text.treatment or pair.treatment.concept
            if name in asked:
                continue
            asked.add(name)
            prompt = QUESTION.format(concept=concept(pair.treatment), text=text.completion)
            subject = about(text, pair.treatment)
            yield Record(id=f"judge-{len(asked)}", prompt=prompt, judged=subject)


def read_number(answer: str) -> float | None:
    """The number from 0 to 100 that an answer gives, None where it does not give exactly one.

    It is the first line where that is a number and no more, else the one number that is called a
    score, else the one number of the answer. Thoughts, from `<think>` to `</think>` or the end, and
    what names the scale ("/100", "0 to 100", "%"), do not count.
    """
    answer = answer.rpartition("</think>")[2].partition("<think>")[0]
    answer = _SCALE.sub(" ", answer).strip()
    first = _ALONE.fullmatch(answer.partition("\n")[0])
    for found in ([first[1]] if first else [], _LABELLED.findall(answer), _ANY.findall(answer)):
        values = set(map(float, found))
        if len(values) == 1 and 0 <= (value := values.pop()) <= 100:
            return value
        if found:
            return None
    return None


class Answers:
    """Scores of texts, several of a text averaged.

    Raises:
        DataError: a record does not say what it is about, or holds no answer.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._found: dict[Key, list[tuple[Mapping[str, Any], float | None]]] = {}
        self.used = 0
        """How many were about a text that was asked for."""
        for record in records:
            subject = Record(record.get("judged") or {**record, **(record.get("steer") or {})})
            subject.where = record.where
            key = field(subject, "id", (str, int)), field(subject, "sample", int)
            self._found.setdefault(key, []).append((subject, _score(record)))

    def of(self, text: Text, treatment: Treatment) -> tuple[float | None, int]:
        """Mean of the scores of a text under a concept, and how many answers held none."""
        wanted = about(text, treatment)
        scores = [s for subject, s in self._found.get(text.key, []) if _agree(subject, wanted)]
        self.used += len(scores)
        read = [score for score in scores if score is not None]
        return sum(read) / len(read) if read else None, len(scores) - len(read)


def _agree(subject: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a score is about this text: in each field that it has, and steered or not."""
    if (subject.get("amplitude") is None) != (wanted.get("amplitude") is None):
        return False
    return all(subject[name] == wanted.get(name) for name in NAMES if name in subject)


def _score(record: Record) -> float | None:
    if "error" in record or ("score" in record and record["score"] is None):
        return None
    if "score" in record:
        value = float(field(record, "score", (int, float)))
        if not 0 <= value <= 100:
            raise DataError(f"field 'score' is {value:g}, expected 0 to 100", record.where)
        return value
    return read_number(field(record, "completion", str, "the judge's answer, or 'score'"))
