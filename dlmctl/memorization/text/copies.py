"""`memo-eval copies`: which stretches of freely generated texts occur verbatim in a corpus.

    longest     units of the longest stretch of a text that one document of the corpus contains too
    copied      share of texts in which this is 50 units or more
    novelty     share of the n-grams of the texts that no document contains; for n = 1, 2, 4, … a
                curve (n-novelty of Merrill, Smith and Elazar, arXiv 2406.13069)

A unit is a token, a word or a character; n-grams are counted as often as they occur. Texts have
much in common with any corpus of their kind, the more the larger it is: how much is measured
against as many texts that the model has not seen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from dlmctl.memorization.text.suffix_array import Integers, Matches, longest_matches
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import OnError, Record, each

WORDS = re.compile(r"\w+|[^\w\s]")
"""A word or a punctuation mark; spaces do not count."""


@dataclass(frozen=True)
class Unit:
    """What texts are cut into."""

    name: str
    cut: Callable[[str], Iterable[Hashable]]
    """Raises DataError if the text cannot be cut."""
    piece: Callable[[str, int, int], str]
    """The text from one unit up to another, exclusive."""


def _words(text: str, start: int, end: int) -> str:
    spans = [match.span() for match in WORDS.finditer(text)]
    return text[spans[start][0] : spans[end - 1][1]]


CHARACTER = Unit("character", str, lambda text, start, end: text[start:end])
WORD = Unit("word", WORDS.findall, _words)


class Document(NamedTuple):
    """A record's text, cut into units."""

    record: Record
    text: str
    symbols: Integers
    """A number for each unit, int64 [G]."""


class Comparison(NamedTuple):
    """Texts against a corpus."""

    corpus: Sequence[Document]
    matches: list[Matches]
    """Of each text."""


def text_of(record: Record) -> str:
    """A record's `completion`, or its `text`; raises DataError if it has neither."""
    text = record.get("completion", record.get("text"))
    if not isinstance(text, str):
        raise DataError("the record has no text: 'completion', or 'text'", record.where)
    return text


def read_documents(
    records: Iterable[Record], unit: Unit, numbers: dict[Hashable, int], on_error: OnError = "fail"
) -> tuple[list[Document], list[Record]]:
    """The texts of records, and the records that cannot be used, if these are kept.

    Args:
        numbers: a number for each unit, to which new units are added. Give the same for all texts
            that are compared.

    Raises:
        DataError: a record has no text, or one that cannot be cut (only with `on_error="fail"`).
    """
    documents: list[Document] = []

    def read(record: Record) -> Record:
        text = text_of(record)
        symbols = [numbers.setdefault(part, len(numbers)) for part in unit.cut(text)]
        documents.append(Document(record, text, numpy.array(symbols, numpy.int64)))
        return record

    faulty = [record for record in each(records, read, on_error) if "error" in record]
    return documents, faulty


def held_out(
    train: Sequence[Document], heldout: Sequence[Document]
) -> tuple[list[Document], list[str]]:
    """As many held-out texts as there are training texts, and notes on them for the user.

    Raises:
        UsageError: there are fewer.
    """
    count, notes = len(train), []
    if len(heldout) < count:
        raise UsageError(
            f"--heldout has {len(heldout)} texts and --train {count}, so that matches in the two "
            f"cannot be compared: give {count} held-out texts, or cut the training set"
        )
    if len(heldout) > count:
        notes.append(f"--heldout is cut from {len(heldout)} to {count} texts, as --train has")
    kept = list(heldout[:count])
    seen = {document.text for document in train}
    if both := sum(document.text in seen for document in kept):
        notes.append(f"{both} of the held-out texts are in --train, too: they are not held out")
    return kept, notes


def compare(texts: Sequence[Document], corpus: Sequence[Document]) -> Comparison:
    """The longest matches of texts in a corpus."""
    symbols = [document.symbols for document in texts]
    return Comparison(corpus, longest_matches(symbols, [each.symbols for each in corpus]))


def figures(
    comparison: Comparison, least: int, orders: Sequence[int]
) -> dict[str, float | int | None]:
    """The longest match over texts, the share with `least` units, and novelty for each order."""
    longest = numpy.array([match.lengths.max(initial=0) for match in comparison.matches])
    return {
        "longest": float(longest.mean()),
        "longest_p95": float(numpy.quantile(longest, 0.95)),
        "longest_max": int(longest.max()),
        "copied": float((longest >= least).mean()),
        **{f"novel_{n}": novelty(comparison.matches, n) for n in orders},
    }


def novelty(matches: Sequence[Matches], n: int) -> float | None:
    """Share of the n-grams of all texts that are not in the corpus; None: there are no n-grams.

    An n-gram is in the corpus if and only if the longest match from its first unit on has at least
    n units.
    """
    lengths = [match.lengths[: max(0, len(match.lengths) - n + 1)] for match in matches]
    count = sum(map(len, lengths))
    return sum(int((each < n).sum()) for each in lengths) / count if count else None


def text_rows(
    texts: Sequence[Document], comparisons: Mapping[str, Comparison], unit: Unit
) -> Iterator[dict[str, Any]]:
    """A record for each text: its longest match, and where it is.

    Args:
        comparisons: by the prefix of their fields.
    """
    for number, (record, text, symbols) in enumerate(texts):
        row: dict[str, Any] = {"id": record.get("id", number)}
        if "sample" in record:
            row["sample"] = record["sample"]
        row["units"] = len(symbols)
        for prefix, comparison in comparisons.items():
            match = _longest(text, comparison.matches[number], comparison.corpus, unit)
            row |= {f"{prefix}{name}": value for name, value in match.items()}
        yield row


def _longest(text: str, matches: Matches, corpus: Sequence[Document], unit: Unit) -> dict[str, Any]:
    """The longest match, the first of several."""
    longest = int(matches.lengths.max(initial=0))
    if not longest:
        return {"longest": 0, "match": ""}
    start = int(matches.lengths.argmax())
    source = int(matches.documents[start])
    return {
        "longest": longest,
        "match": unit.piece(text, start, start + longest),
        "start": start,
        "source": corpus[source].record.get("id", source),
        "source_start": int(matches.starts[start]),
    }
