"""Questions to a judge of concepts, as records, and the scores in its answers.

A question is a prompt record that any language model, or any other program, can answer; its field
`judged` says which text it is about. A text is judged by itself, without its prompt, so that the
judge does not see which of two is steered; an unsteered text is judged once for each concept,
whatever the number of amplitudes. Answers are records with `judged` and `completion`, or with
`score` (0..100).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, field
from dlmctl.sae.judges import read_score
from dlmctl.sae.steering.twins import Key, SampledText, Treatment, Twins

QUESTION = """\
Below are a concept and a text.

Concept: {concept}

Text:
{text}

How strongly does the text express the concept? Answer with one whole number from 0 (not at all) \
to 100 (as strongly as a text can), and with nothing else.
"""

CONCEPT = ("sae", "layer", "feature")
NAMES = (*CONCEPT, "amplitude", "scope", "time", "unit")
"""Fields that say what a score is about, besides `id` and `sample`."""


def subject_of(text: SampledText, treatment: Treatment) -> dict[str, Any]:
    """What a score of this text under the concept of this feature is about."""
    names = NAMES if text.treatment is not None else CONCEPT
    steer = treatment.fields()
    identity = {"id": text.key[0], "sample": text.key[1]}
    return identity | {name: steer[name] for name in names}


def explanations(records: Iterable[Record], where: str) -> Callable[[Treatment], str]:
    """The concepts of features, from the records of a file with `feature` and `explanation`.

    The fields `sae` and `layer` narrow what a record is about. The function raises DataError for a
    feature without an explanation.
    """
    known: dict[int, list[tuple[Record, str]]] = {}
    for record in records:
        explanation = field(record, "explanation", str, "what the feature stands for")
        known.setdefault(field(record, "feature", int), []).append((record, explanation))

    def find(treatment: Treatment) -> str:
        wanted = treatment.fields()
        for record, explanation in known.get(treatment.feature, []):
            if all(record.get(name, wanted[name]) == wanted[name] for name in CONCEPT):
                return explanation
        raise DataError(f"no explanation of feature {treatment.feature} of {treatment.sae}", where)

    return find


def questions(twins: Iterable[Twins], concept: Callable[[Treatment], str]) -> Iterator[Record]:
    """A prompt record for each text and concept."""
    asked = set()
    for before, after, treatment in twins:
        for text in (before, after):
            name = text.key, text.treatment or treatment[: len(CONCEPT)]
            if name in asked:
                continue
            asked.add(name)
            prompt = QUESTION.format(concept=concept(treatment), text=text.completion)
            subject = subject_of(text, treatment)
            yield Record(id=f"judge-{len(asked)}", prompt=prompt, judged=subject)


class Answers:
    """Scores of texts; several of one text are averaged.

    Raises:
        DataError: a record does not say what it is about, or has no answer.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._scores: dict[Key, list[tuple[Mapping[str, Any], float | None]]] = {}
        self.used = 0
        """How many were about a text that was asked for."""
        for record in records:
            subject = Record(record.get("judged") or {**record, **(record.get("steer") or {})})
            subject.where = record.where
            key = field(subject, "id", (str, int)), field(subject, "sample", int)
            self._scores.setdefault(key, []).append((subject, _score(record)))

    def of(self, text: SampledText, treatment: Treatment) -> tuple[float | None, int]:
        """Mean score of a text under a concept, and how many answers had no score."""
        wanted = subject_of(text, treatment)
        scores = [s for subject, s in self._scores.get(text.key, []) if _agree(subject, wanted)]
        self.used += len(scores)
        read = [score for score in scores if score is not None]
        return sum(read) / len(read) if read else None, len(scores) - len(read)


def _agree(subject: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a score is about this text: equal in each field it has, and steered or not."""
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
    return read_score(field(record, "completion", str, "the judge's answer, or 'score'"))
