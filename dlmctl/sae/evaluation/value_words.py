"""Tokens that express the value of a concept, from labelled sentences.

A token counts as a word of a value if, on the texts of even numbers,

    at least 99 % of the sentences with the token have the value, and
    p^D <= 0.01 / (number of distinct tokens),

p being the share of the sentences that have the value, and D the number of texts with the token in
a sentence that has it: the first could be chance for a rare token, and is not for such a one. It is
counted by texts, as a text repeats its words. A word of several tokens is as many such tokens, as
far as each by itself meets the two conditions.

With `task`, tokens count only within the expressions that the task of the record has for the value
of the sentence (`dlmctl.verifiers.concepts`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.corpus import Document
from dlmctl.sae.evaluation.halves import Names
from dlmctl.sae.evaluation.sentences import (
    Labelled,
    LabelledBatch,
    character_ends,
    document_text,
    sentence_labels,
)
from dlmctl.settings.probing import ValueWords
from dlmctl.tasks.concepts import CONCEPTS
from dlmctl.verifiers.concepts import expression_spans

PURITY = 0.99
"""Least share of the sentences with a word of a value that have the value."""
CHANCE = 0.01
"""Bound on the number of tokens that are words of a value by chance."""


def value_words(
    labelled: Labelled, names: Names, source: ValueWords, policy: Policy
) -> dict[tuple[str, Any], list[int]]:
    """The tokens of each value, ascending; some may have none.

    Raises:
        DataError: with `task`, a record is of a task that names no expressions.
    """
    tables = {
        concept: _tokens_of_sentences(labelled, concept, source, policy)
        for concept in dict.fromkeys(concept for concept, _ in names)
    }
    return {name: _pure_tokens(labelled, *name, tables[name[0]]) for name in names}


def _pure_tokens(labelled: Labelled, concept: str, value: object, table: Tensor) -> list[int]:
    """The words of a value, from distinct pairs of a token and a sentence, int64 [2, P]."""
    has_value = torch.tensor([values[concept] == value for values in labelled.values])
    share = float(has_value[labelled.document % 2 == 0].double().mean())
    tokens, place = table[0].unique(return_inverse=True)
    inside = has_value[table[1]]
    sentences = torch.bincount(place, minlength=len(tokens))
    with_value = torch.bincount(place[inside], minlength=len(tokens))
    texts = torch.stack([place[inside], labelled.document[table[1][inside]]]).unique(dim=1)
    documents = torch.bincount(texts[0], minlength=len(tokens))
    pure = with_value >= PURITY * sentences
    rare = share ** documents.double() <= CHANCE / max(1, len(tokens))
    return [int(token) for token in tokens[pure & rare]]


def _tokens_of_sentences(
    labelled: Labelled, concept: str, source: ValueWords, policy: Policy
) -> Tensor:
    """Distinct pairs of a token and the number of a sentence of the first half, int64 [2, P]."""
    pairs = [torch.zeros(2, 0, dtype=torch.int64)]
    for part in labelled.batches:
        counts = (part.sentence >= 0) & part.batch.valid.cpu()
        if source == "task":
            counts = counts & _within_expressions(part, concept, policy)
        sentence = part.sentence[counts]
        first = labelled.document[sentence] % 2 == 0
        pairs.append(torch.stack([part.batch.ids.cpu()[counts][first], sentence[first]]))
    return torch.cat(pairs, dim=1).unique(dim=1)


def _within_expressions(part: LabelledBatch, concept: str, policy: Policy) -> Tensor:
    """bool [B, T]: tokens whose last character is in an expression of the concept."""
    within = torch.zeros_like(part.sentence, dtype=torch.bool)
    for row, document in zip(within, part.batch.documents, strict=True):
        spans = list(_expressions(document, concept))
        ends = character_ends(document, policy)
        row[: len(ends)] = torch.tensor([any(a < end <= b for a, b in spans) for end in ends])
    return within


def _expressions(document: Document, concept: str) -> Iterator[tuple[int, int]]:
    """Spans of characters of a document's text."""
    record = document.record
    if record.get("task") != "concepts" or concept not in CONCEPTS:
        raise DataError(
            "--words task is for records of the task concepts, which names the expressions of its "
            "values: take --words corpus",
            record.where,
        )
    text = document_text(record)
    for label in sentence_labels(record):
        start, end = label["start"], label["end"]
        if label[concept] not in CONCEPTS[concept]:
            raise DataError(f"the task has no {concept} '{label[concept]}'", record.where)
        for first, last in expression_spans(text[start:end], concept, label[concept]):
            yield start + first, start + last
