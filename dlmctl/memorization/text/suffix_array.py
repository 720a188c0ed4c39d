"""The longest match in a corpus from each place of some texts on, exactly.

Texts and documents are joined in one array, each followed by a separator of its own, and the
suffixes of that array are sorted by prefix doubling (Manber and Myers 1993): places with the same h
symbols form a class, and a class is divided by the classes of the places h further on. The longest
match of a text's suffix is with the document suffix just before or just after it in that order. The
classes also give its length: the largest h at which both are in one class, then the next one from
there on, as the digits of a binary number.

Only classes that contain a place of a text and one of a document are divided further. The others
need no order of their own, as they contain nothing that a text and the corpus have in common. So
repetitions within the corpus cost nothing; the number of rounds depends on the longest match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[numpy.int64]


class Matches(NamedTuple):
    """The longest match of each suffix of one text, int64 [G] each."""

    lengths: Integers
    """Symbols in common."""
    documents: Integers
    """A document that contains them; -1 if none does."""
    starts: Integers
    """Where they begin in it; -1 if no document contains them."""


def longest_matches(texts: Sequence[Integers], corpus: Sequence[Integers]) -> list[Matches]:
    """For each place of each text the longest stretch from there on that a document contains too.

    Time is O(n log n log m) and memory O(n log m) for n symbols in all and a longest match of m.

    Args:
        texts, corpus: int64 [G] each, symbols >= 0; a match is within one text and one document.
    """
    symbols, ends = _joined([*texts, *corpus])
    own = int(ends[len(texts) - 1]) if len(texts) else 0
    levels, ranks = _classes(symbols, own)
    # 1. The better of the two neighbours in the order of suffixes.
    before, after = _neighbours(ranks, own)
    places = numpy.arange(own)
    lengths, others = _common(levels, places, before), _common(levels, places, after)
    at = numpy.where(others > lengths, after, before)
    lengths = numpy.maximum(lengths, others)
    # 2. From places of the array to places of documents.
    part_of = numpy.searchsorted(ends, at, "right")
    documents = numpy.where(lengths > 0, part_of - len(texts), -1)
    starts = numpy.where(lengths > 0, at - numpy.append(0, ends)[part_of], -1)
    # 3. Text by text, without the separators.
    matches, start = [], 0
    for text in texts:
        part = slice(start, start + len(text))
        matches.append(Matches(lengths[part], documents[part], starts[part]))
        start = part.stop + 1
    return matches


def _joined(parts: Sequence[Integers]) -> tuple[Integers, Integers]:
    """All parts in a row, followed by -1, -2, … each, and where each ends with its separator."""
    lengths = numpy.array([len(part) + 1 for part in parts], numpy.int64)
    ends = lengths.cumsum()
    symbols = numpy.empty(int(lengths.sum()), numpy.int64)
    for number, (part, end) in enumerate(zip(parts, ends, strict=True)):
        symbols[end - 1 - len(part) : end - 1] = part
        symbols[end - 1] = -1 - number
    return symbols, ends


def _classes(symbols: Integers, own: int) -> tuple[list[NDArray[Any]], Integers]:
    """Classes of places by their first 1, 2, 4, … symbols, and the ranks of the final ones.

    The number of a class is the count of places that come before it. The list does not have the
    classes of the last round, none of which contains both a place before `own` and another.
    """
    active = symbols.argsort(kind="stable")
    ranks = numpy.empty(len(symbols), numpy.int64)
    ranks[active] = _firsts(symbols[active])
    levels: list[NDArray[Any]] = []
    kind = numpy.int32 if len(symbols) < 2**31 else numpy.int64
    while len(active := _mixed(active, ranks, own)):
        # Two places have these symbols in common, so that no separator is among them and what
        # comes next is within the array.
        further = ranks[active + 2 ** len(levels)]
        levels.append(ranks.astype(kind))
        keys = ranks[active] * len(symbols) + further
        order = keys.argsort(kind="stable")
        active, keys = active[order], keys[order]
        # A class is active as a whole, and keeps its place in the order.
        old = keys // len(symbols)
        ranks[active] = old + _firsts(keys) - _firsts(old)
    return levels, ranks


def _firsts(values: Integers) -> Integers:
    """For each of sorted values, how many are smaller."""
    new = numpy.empty(len(values), bool)
    new[:1] = True
    numpy.not_equal(values[1:], values[:-1], out=new[1:])
    return numpy.maximum.accumulate(numpy.where(new, numpy.arange(len(values)), 0))


def _mixed(places: Integers, ranks: Integers, own: int) -> Integers:
    """Of places sorted by class, those whose class contains some before `own` and some others."""
    if not len(places):
        return places
    classes = ranks[places]
    begins = numpy.flatnonzero(numpy.diff(classes, prepend=-1))
    sizes = numpy.diff(begins, append=len(places))
    inside = numpy.add.reduceat((places < own).astype(numpy.int64), begins)
    return places[numpy.repeat((inside > 0) & (inside < sizes), sizes)]


def _neighbours(ranks: Integers, own: int) -> tuple[Integers, Integers]:
    """For each place before `own` the nearest others before and after it in the order, or -1."""
    order = ranks.argsort(kind="stable")
    number = numpy.arange(len(order))
    other = order >= own
    below = numpy.maximum.accumulate(numpy.where(other, number, -1))
    above = numpy.minimum.accumulate(numpy.where(other, number, len(order))[::-1])[::-1]
    padded = numpy.append(order, -1)  # -1 and len(order) both mean none
    before, after = numpy.full(own, -1), numpy.full(own, -1)
    mine = order[~other]
    before[mine], after[mine] = padded[below[~other]], padded[above[~other]]
    return before, after


def _common(levels: Sequence[NDArray[Any]], places: Integers, others: Integers) -> Integers:
    """Number of symbols in common from each place and its other on; 0 if the other is -1."""
    lengths = numpy.zeros(len(places), numpy.int64)
    there = numpy.flatnonzero(others >= 0)
    one, two = places[there], others[there]
    for level in reversed(range(len(levels))):
        same = levels[level][one] == levels[level][two]
        step = same * numpy.int64(2**level)
        one, two = one + step, two + step
    lengths[there] = one - places[there]
    return lengths
