"""How similar two sequences of tokens are: edits, common n-grams, the longest common run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4
"""Most tokens of an n-gram of BLEU."""


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levenshtein distance: insertions, deletions and substitutions of tokens."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def common_run(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens of the longest common substring, which both contain without a gap."""
    longest, row = 0, [0] * (len(other) + 1)
    for a in one:
        # From the right, so that the entry to the left is still that of the previous token.
        for j in range(len(other), 0, -1):
            row[j] = row[j - 1] + 1 if a == other[j - 1] else 0
        longest = max(longest, *row)
    return longest


def bleu(candidate: Sequence[int], reference: Sequence[int]) -> float:
    """Sentence BLEU-4 of a candidate against one reference, in [0, 1].

    The geometric mean of the precisions p_n of n-grams, n = 1 to 4, each n-gram counted at most as
    often as it is in the reference; times exp(1 - reference / candidate), by their lengths, if the
    candidate is shorter. Smoothing is that of NIST (method 3 of Chen and Cherry 2014): the k-th p_n
    without a match, of N n-grams, is 1 / (2^k N) instead of 0; the other p_n are unchanged. For a
    candidate of fewer than four tokens only the n-grams that it has count. It is 0 if no token is
    right.

    Source: Papineni et al. 2002, equations 1 to 3.
    """
    if not set(candidate) & set(reference):
        return 0.0
    total, missed = 0.0, 0
    orders = range(1, min(ORDER, len(candidate)) + 1)
    for n in orders:
        ngrams = _ngrams(candidate, n)
        right = (ngrams & _ngrams(reference, n)).total()
        missed += not right
        total += math.log((right or 0.5**missed) / ngrams.total())
    return math.exp(total / len(orders) + min(0.0, 1 - len(reference) / len(candidate)))


def _ngrams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
