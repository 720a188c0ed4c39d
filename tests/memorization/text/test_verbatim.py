"""Measures of sequences by hand, and the longest common run by trying every stretch."""

from __future__ import annotations

import math
import random

import pytest

from dlmctl.memorization.text.verbatim import bleu, common_run, edit_distance


def test_edit_distance_by_hand():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance([1, 2, 3], [1, 2, 3]) == 0
    assert edit_distance([1, 2, 3, 4], [2, 3, 4, 5]) == 2


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [
        ("abcdefgh", "abcdefgh", 1),
        ("abc", "abc", 1),
        ("a", "a", 1),
        ("", "abc", 0),
        ("dddd", "abc", 0),
        # 7 of 8 tokens, 6 of 7 pairs, 5 of 6 triples, 4 of 5 quadruples.
        ("abcdefgX", "abcdefgh", (7 / 8 * 6 / 7 * 5 / 6 * 4 / 5) ** 0.25),
        # The same in the middle: the wrong token spoils more of them.
        ("abcXefgh", "abcdefgh", (7 / 8 * 5 / 7 * 3 / 6 * 1 / 5) ** 0.25),
        # An n-gram counts as often as the wanted text has it: 2 of 4, 1 of 3, then none.
        ("aaaa", "aabc", (2 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** 0.25),
        # No pair is right, nor anything longer: halves, quarters, eighths of one.
        ("abcd", "dcba", (4 / 4 * (1 / 2) / 3 * (1 / 4) / 2 * (1 / 8) / 1) ** 0.25),
        # Two tokens have one pair and nothing longer.
        ("ab", "ac", (1 / 2 * (1 / 2) / 1) ** 0.5),
        # Half the length is there, and all of it right.
        ("abcd", "abcdefgh", math.exp(1 - 8 / 4)),
        # Too long costs precision alone.
        ("abcdefgh", "abcd", (4 / 8 * 3 / 7 * 2 / 6 * 1 / 5) ** 0.25),
    ],
)
def test_bleu_by_hand(found, wanted, value):
    assert bleu(found, wanted) == pytest.approx(value, rel=1e-12)


def test_common_run_is_that_of_every_stretch():
    draw = random.Random(0)
    for _ in range(300):
        one, other = ("".join(draw.choices("ab", k=draw.randrange(9))) for _ in range(2))
        runs = [one[i:j] for i in range(len(one)) for j in range(i + 1, len(one) + 1)]
        assert common_run(one, other) == max((len(r) for r in runs if r in other), default=0)
