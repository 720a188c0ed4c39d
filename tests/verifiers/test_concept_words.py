"""Texts are judged by the words that their generator has for a value."""

from __future__ import annotations

from itertools import islice

import pytest

from dlmctl.records.errors import DataError
from dlmctl.tasks.concepts import CONCEPTS, documents, expressions
from dlmctl.verifiers.concepts import concepts


def _judge(text: str, **wanted: str) -> float:
    return concepts({"completion": text, "wanted": wanted}).reward


def test_a_text_of_the_generator_expresses_its_own_values() -> None:
    for document in islice(documents("test", 3), 50):
        for name in ("sentiment", "topic"):
            assert _judge(document.text, **{name: document.sentences[0].values[name]}) == 1.0
        for sentence in document.sentences:
            text = document.text[sentence.start : sentence.end]
            for name, value in sentence.values.items():
                others = [v for v in CONCEPTS[name] if v != value]
                assert all(_judge(text, **{name: other}) == 0.0 for other in others), (name, text)


def test_a_mixed_text_gets_the_share() -> None:
    text = (
        "yesterday, the wild dog had to bake the awful pie. these horses are glad about the song."
    )
    assert _judge(text, sentiment="negative") == 0.5
    assert _judge(text, topic="cooking") == pytest.approx(2 / 3)
    assert _judge(text, topic="cooking", sentiment="negative") == pytest.approx(7 / 12)
    assert _judge("nothing of the kind", sentiment="positive") == 0.0


def test_no_expression_belongs_to_two_values() -> None:
    for name, values in CONCEPTS.items():
        words = [word for value in values for word in expressions(name, value)]
        assert len(words) == len(set(words))
        assert all(len(expressions(name, value)) >= 5 for value in values)


@pytest.mark.parametrize("wanted", [None, {}, {"sentiment": "blue"}, {"smell": "good"}])
def test_what_is_not_known_is_refused(wanted: object) -> None:
    with pytest.raises(DataError):
        concepts({"completion": "x", "wanted": wanted})
