"""The longest stretch of a corpus that begins at each place of some texts, exactly.

Texts and documents stand in one array, each with a separator of its own behind it, and the suffixes
of that array are sorted by prefix doubling (Manber and Myers 1993): places with the same h symbols
are a class, and a class is divided by the classes of the places h further on. The longest match of
a text's suffix is with the suffix of a document just before or just after it in that order. How
long it is the classes say: the largest h at which both are in one class, then the next one from
there on, as the digits of a binary number.

Only classes that hold a place of a text and one of a document are divided further. The others need
no order of their own: nothing that a text has in common with the corpus is in them. So what a
corpus repeats within itself costs nothing; the number of rounds goes by the longest match.
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
    """A document that has them; -1 where nothing is in common."""
    starts: Integers
    """Where they begin in it; -1 where nothing is in common."""


def longest_matches(texts: Sequence[Integers], corpus: Sequence[Integers]) -> list[Matches]:
    """For each place of each text the longest stretch from there that a document has, too.

    Time is O(n log n log m) and memory O(n log m) for n symbols in all and a longest match of m.

    Args:
        texts, corpus: int64 [G] each, symbols >= 0; a match is within one text and one document.
    """
    symbols, ends = _joined([*texts, *corpus])
    own = int(ends[len(texts) - 1]) if len(texts) else 0
    levels, ranks = _classes(symbols, own)
    before, after = _neighbours(ranks, own)
    places = numpy.arange(own)
    lengths, at = _common(levels, places, before), before
    others = _common(levels, places, after)
    at = numpy.where(others > lengths, after, at)
    lengths = numpy.maximum(lengths, others)
    found = lengths > 0
    part_of = numpy.searchsorted(ends, at, "right")
    documents = numpy.where(found, part_of - len(texts), -1)
    starts = numpy.where(found, at - numpy.append(0, ends)[part_of], -1)
    made, start = [], 0
    for text in texts:
        part = slice(start, start + len(text))
        made.append(Matches(lengths[part], documents[part], starts[part]))
        start = part.stop + 1
    return made


def _joined(parts: Sequence[Integers]) -> tuple[Integers, Integers]:
    """All parts in a row, -1, -2, … behind each, and where each ends, its separator included."""
    lengths = numpy.array([len(part) + 1 for part in parts], numpy.int64)
    ends = lengths.cumsum()
    symbols = numpy.empty(int(lengths.sum()), numpy.int64)
    for number, (part, end) in enumerate(zip(parts, ends, strict=True)):
        symbols[end - 1 - len(part) : end - 1] = part
        symbols[end - 1] = -1 - number
    return symbols, ends


def _classes(symbols: Integers, own: int) -> tuple[list[NDArray[Any]], Integers]:
    """Classes of places by their first 1, 2, 4, … symbols, and at last by as many as it takes.

    A class has for a number how many places come before it. Those of the last round are not in the
    list: none of them holds both a place before `own` and another.
    """
    active = symbols.argsort(kind="stable")
    ranks = numpy.empty(len(symbols), numpy.int64)
    ranks[active] = _firsts(symbols[active])
    levels: list[NDArray[Any]] = []
    kind = numpy.int32 if len(symbols) < 2**31 else numpy.int64
    while len(active := _mixed(active, ranks, own)):
        # Two places have these symbols in common, so that no separator is among them: what comes
        # next is within the array.
        further = ranks[active + 2 ** len(levels)]
        levels.append(ranks.astype(kind))
        keys = ranks[active] * len(symbols) + further
        order = keys.argsort(kind="stable")
        active, keys = active[order], keys[order]
        # A class is active as a whole, and stays where it was.
        old = keys // len(symbols)
        ranks[active] = old + _firsts(keys) - _firsts(old)
    return levels, ranks


def _firsts(values: Integers) -> Integers:
    """For each of sorted values, how many are less."""
    new = numpy.empty(len(values), bool)
    new[:1] = True
    numpy.not_equal(values[1:], values[:-1], out=new[1:])
    return numpy.maximum.accumulate(numpy.where(new, numpy.arange(len(values)), 0))


def _mixed(places: Integers, ranks: Integers, own: int) -> Integers:
    """Of places sorted by class, those of classes that hold some before `own` and some others."""
    if not len(places):
        return places
    classes = ranks[places]
    begins = numpy.flatnonzero(numpy.diff(classes, prepend=-1))
    sizes = numpy.diff(begins, append=len(places))
    inside = numpy.add.reduceat((places < own).astype(numpy.int64), begins)
    return places[numpy.repeat((inside > 0) & (inside < sizes), sizes)]


def _neighbours(ranks: Integers, own: int) -> tuple[Integers, Integers]:
    """For each place before `own` the nearest others in the order; -1 where there is none."""
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
    """Symbols in common from each place and its other on; 0 where that is -1."""
    lengths = numpy.zeros(len(places), numpy.int64)
    there = numpy.flatnonzero(others >= 0)
    one, two = places[there], others[there]
    for level in reversed(range(len(levels))):
        same = levels[level][one] == levels[level][two]
        step = same * numpy.int64(2**level)
        one, two = one + step, two + step
    lengths[there] = one - places[there]
    return lengths
