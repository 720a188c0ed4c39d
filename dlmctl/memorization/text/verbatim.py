"""How near one sequence of tokens is to another: edits, n-grams in common, the longest run.

edit distance     insertions, deletions and substitutions (Levenshtein)
BLEU              n-grams of up to four tokens in common (Papineni et al. 2002)
common run        tokens of the longest stretch that both hold without a gap
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

ORDER = 4
"""BLEU goes by n-grams of up to so many tokens."""


def edit_distance(one: Sequence[int], other: Sequence[int]) -> int:
    """Levenshtein's: insertions, deletions and substitutions of tokens."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        above, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (a != b))
    return row[-1]


def common_run(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens of the longest common substring: both hold it, without a gap."""
    longest, row = 0, [0] * (len(other) + 1)
    for a in one:
        # From the right, so that what stands to the left is still of the token before.
        for j in range(len(other), 0, -1):
            row[j] = row[j - 1] + 1 if a == other[j - 1] else 0
        longest = max(longest, *row)
    return longest


def bleu(found: Sequence[int], wanted: Sequence[int]) -> float:
    """Sentence BLEU-4 of what was found against the one text that was wanted, in [0, 1].

    The geometric mean of the precisions p_n of n-grams, n = 1 to 4, each n-gram counted at most as
    often as the text that was wanted has it; times exp(1 - wanted / found) where fewer tokens were
    found than wanted. Smoothing is that of NIST (method 3 of Chen and Cherry 2014): the k-th p_n
    without a match, of N n-grams, is 1 / (2^k N) instead of 0; any other p_n is as it is. A text
    shorter than four tokens goes by the n-grams that it has. It is 0 where no token is right.

    Source: Papineni et al. 2002, equations 1 to 3.
    """
    if not set(found) & set(wanted):
        return 0.0
    total, missed = 0.0, 0
    orders = range(1, min(ORDER, len(found)) + 1)
    for n in orders:
        own = _ngrams(found, n)
        right = (own & _ngrams(wanted, n)).total()
        missed += not right
        total += math.log((right or 0.5**missed) / own.total())
    return math.exp(total / len(orders) + min(0.0, 1 - len(wanted) / len(found)))


def _ngrams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
