"""Longest matches of texts in a corpus, against trying every stretch."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dlmctl.memorization.text.suffix_array import longest_matches


def symbols(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], dtype=np.int64)


def matches(texts: list[str], corpus: list[str]):
    return longest_matches([symbols(t) for t in texts], [symbols(d) for d in corpus])


def lengths(texts: list[str], corpus: list[str]) -> list[list[int]]:
    return [match.lengths.tolist() for match in matches(texts, corpus)]


def brute(text: str, corpus: list[str]) -> list[int]:
    return [
        max(j - i for j in range(i, len(text) + 1) if j == i or any(text[i:j] in d for d in corpus))
        for i in range(len(text))
    ]


@pytest.mark.parametrize("alphabet", ["a", "ab", "abc"])
def test_every_length_and_place_is_that_of_brute_force(alphabet):
    draw = random.Random(alphabet)

    def some(most: int) -> list[str]:
        count = draw.randrange(most)
        return ["".join(draw.choices(alphabet, k=draw.randrange(14))) for _ in range(count)]

    for _ in range(300):
        texts, corpus = some(4), some(5) * draw.choice([1, 1, 3])
        found = matches(texts, corpus)
        assert len(found) == len(texts)
        for text, match in zip(texts, found, strict=True):
            assert match.lengths.tolist() == brute(text, corpus), (texts, corpus)
            for i, (length, document, start) in enumerate(zip(*match, strict=True)):
                if length:
                    assert corpus[document][start : start + length] == text[i : i + length]
                else:
                    assert document == start == -1


def test_a_match_is_within_one_document_and_one_text():
    assert lengths(["abcd"], ["ab", "cd"]) == [[2, 1, 2, 1]]
    assert lengths(["ab", "cd"], ["abcd"]) == [[2, 1], [2, 1]]
    # What texts have in common with each other is no match.
    assert lengths(["abab", "abab"], ["xyz"]) == [[0] * 4, [0] * 4]


def test_long_repeats():
    """Copies of a document, and one symbol over and over, which sort slowly elsewhere."""
    draw = random.Random(0)
    document = "".join(draw.choices("abcd", k=3000))
    [found] = lengths([document[500:2500]], [document] * 20)
    assert found == list(range(2000, 0, -1))
    [found] = lengths(["a" * 1000], ["a" * 700])
    assert found == [min(700, 1000 - i) for i in range(1000)]


def test_order_and_copies_of_documents_do_not_matter():
    draw = random.Random(1)
    texts = ["".join(draw.choices("ab", k=30)) for _ in range(4)]
    corpus = ["".join(draw.choices("ab", k=25)) for _ in range(6)]
    expected = lengths(texts, corpus)
    assert expected == lengths(texts, corpus[::-1]) == lengths(texts, corpus * 2)
    assert expected[::-1] == lengths(texts[::-1], corpus)
    # Names of symbols do not, either.
    other = {"a": "z", "b": "c"}
    assert expected == lengths(
        ["".join(map(other.get, t)) for t in texts], ["".join(map(other.get, d)) for d in corpus]
    )


def test_nothing_has_nothing_in_common():
    assert lengths([], ["ab"]) == []
    assert lengths(["ab", ""], []) == [[0, 0], []]
    assert lengths(["ab"], [""]) == [[0, 0]]
