"""Short texts with five planted concepts, which are known for every sentence.

Topic and sentiment apply to a document; each sentence draws its subject, tense and number. Many
words express a value (`lexicon`), and most places of a sentence express more than one concept, as a
verb expresses topic, tense and number: a masked word has to be inferred from values, not from
another word.

A combination of the five values belongs to one split. With the values counted from 0, a sentence is
a test sentence if

    (subject + topic + 2 tense + 3 number + 3 sentiment) mod 6 = 0

This makes any two concepts independent in both splits. If a digest assigned combinations to splits,
a feature of one concept would reveal a little about another.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

from dlmctl.settings.prompts import WORDS, Prompts, Split
from dlmctl.tasks.lexicon import (
    COPULAS,
    DETERMINERS,
    FUTURES,
    PREPOSITIONS,
    SENTIMENTS,
    SUBJECTS,
    TIMES,
    TOPICS,
    participle,
    plural,
    verb_form,
)

PROMPT = "story:"
"""An autoregressive model needs something to begin with."""
SENTENCES = (3, 5)
"""Fewest and most sentences of a document."""
CONCEPTS: dict[str, tuple[str, ...]] = {
    "subject": tuple(SUBJECTS),
    "tense": tuple(TIMES),
    "number": tuple(DETERMINERS),
    "sentiment": tuple(SENTIMENTS),
    "topic": tuple(TOPICS),
}
"""Concept to its values."""
_BOTH = ("singular", "plural")
_WEIGHTS = {"subject": 1, "topic": 1, "tense": 2, "number": 3, "sentiment": 3}

_TEMPLATES = (
    "{time}, {actor} {act} the {adjective} {object} {preposition} the {place}.",
    "{actor} {act} the {adjective} {object} {adverb} {time}.",
    "{adverb}, {actor} {act} the {object} {preposition} the {place} {time}.",
    "{time}, {actor} {act} the {object} {adverb} {preposition} the {place}.",
    "{time}, {actor} {state} {feeling} about the {object} {preposition} the {place}.",
    "{actor} {state} {feeling} about the {adjective} {object} {time}.",
)


class Sentence(NamedTuple):
    """A span of a document's text, and its value of each concept."""

    start: int
    end: int
    """Behind the full stop."""
    values: dict[str, str]


class Document(NamedTuple):
    """A text of sentences separated by spaces."""

    text: str
    sentences: list[Sentence]


_Pick = Callable[[Sequence[str]], str]


def records(settings: Prompts, seed: int) -> Iterator[dict[str, Any]]:
    """An endless stream of records of task concepts."""
    for document in documents(settings.split, seed, settings.words):
        digest = blake2b(document.text.encode(), digest_size=8).hexdigest()
        yield {
            "id": f"concepts/{digest}",
            "task": "concepts",
            "prompt": PROMPT,
            **({"wanted": dict(settings.wanted)} if settings.wanted else {}),
            "completion": document.text,
            "sentences": [{"start": s.start, "end": s.end, **s.values} for s in document.sentences],
        }


def documents(split: Split = "train", seed: int = 0, words: int = WORDS) -> Iterator[Document]:
    """An endless stream of documents; a part of a sentence has a choice of `words` per value."""
    draw = random.Random(f"concepts/{split}/{seed}")

    def pick(choices: Sequence[str]) -> str:
        return draw.choice(choices[:words])

    while True:
        text, sentences = "", []
        whole = {name: draw.choice(CONCEPTS[name]) for name in ("sentiment", "topic")}
        for _ in range(draw.randint(*SENTENCES)):
            values = _values(whole, split, draw)
            start = len(text) + bool(text)
            text += " " * bool(text) + _sentence(values, pick, draw)
            sentences.append(Sentence(start, len(text), values))
        yield Document(text, sentences)


def expressions(concept: str, value: str) -> frozenset[str]:
    """Words and phrases that express a value and no other value of the concept."""
    others = (_expressions(concept, other) for other in CONCEPTS[concept] if other != value)
    return _expressions(concept, value).difference(*others)


def _expressions(concept: str, value: str) -> frozenset[str]:
    if concept == "sentiment":
        return frozenset(word for words in SENTIMENTS[value] for word in words)
    if concept == "subject":
        kind = SUBJECTS[value]
        return frozenset([*kind.nouns, *map(plural, kind.nouns), *kind.adjectives])
    if concept == "topic":
        topic = TOPICS[value]
        forms = {
            verb_form(v, t, n) for v in topic.verbs for t in ("past", "present") for n in _BOTH
        }
        return frozenset([*topic.objects, *topic.places, *forms, *map(participle, topic.verbs)])
    return frozenset(TIMES[value] if concept == "tense" else DETERMINERS[value])


def split_of(values: dict[str, str]) -> Split:
    """The split of sentences with these values."""
    places = {name: CONCEPTS[name].index(value) for name, value in values.items()}
    total = sum(_WEIGHTS[name] * place for name, place in places.items())
    return "test" if total % 6 == 0 else "train"


def _values(whole: dict[str, str], split: Split, draw: random.Random) -> dict[str, str]:
    """One value of each concept, with those of the document."""
    while True:
        values = {n: whole[n] if n in whole else draw.choice(v) for n, v in CONCEPTS.items()}
        if split_of(values) == split:
            return values


def _sentence(values: dict[str, str], pick: _Pick, draw: random.Random) -> str:
    tense, number = values["tense"], values["number"]
    topic, mood = TOPICS[values["topic"]], SENTIMENTS[values["sentiment"]]
    return draw.choice(_TEMPLATES).format(
        time=pick(TIMES[tense]),
        actor=_actor(values["subject"], number, pick),
        act=_verb(pick(topic.verbs), tense, number, draw),
        state=_verb(draw.choice(COPULAS), tense, number, draw),
        adjective=pick(mood.adjectives),
        adverb=pick(mood.adverbs),
        feeling=pick(mood.feelings),
        object=pick(topic.objects),
        preposition=draw.choice(PREPOSITIONS),
        place=pick(topic.places),
    )


def _actor(subject: str, number: str, pick: _Pick) -> str:
    kind = SUBJECTS[subject]
    noun = pick(kind.nouns)
    words = [pick(DETERMINERS[number]), pick(kind.adjectives)]
    return " ".join([*words, plural(noun) if number == "plural" else noun])


def _verb(verb: str, tense: str, number: str, draw: random.Random) -> str:
    """The verb with its auxiliaries; verbs of state have no progressive form."""
    if tense == "future":
        marker = draw.choice(FUTURES)
        be = "" if marker in ("will", "shall") else verb_form("be", "present", number) + " "
        return f"{be}{marker} {verb}"
    kind = draw.choice(("simple", "must") if verb in COPULAS else ("simple", "must", "progressive"))
    if kind == "must":
        return f"{verb_form('have', tense, number)} to {verb}"
    if kind == "progressive":
        return f"{verb_form('be', tense, number)} {participle(verb)}"
    return verb_form(verb, tense, number)
