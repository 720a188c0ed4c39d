"""The two halves of a labelled corpus: one to choose and fit on, one to measure on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.records.errors import DataError, UsageError
from dlmctl.sae.evaluation.sentences import Tokens
from dlmctl.sae.logistic import Probe, fit_probe

Names = Sequence[tuple[str, Any]]
"""Concepts and values."""


class Half(NamedTuple):
    """S sentences with N tokens that count."""

    states: Tensor
    """float32 [N, d]."""
    sentence: Tensor
    """int64 [N], each of 0 to S - 1 at least once."""
    present: Tensor
    """bool [V, S], which sentences have which value."""
    document: Tensor
    """int64 [S], the number of the sentence's document."""

    def means(self, rows: Tensor) -> Tensor:
        """Means over the tokens of each sentence, float64 [S, C], of rows [N, C]."""
        sums = rows.new_zeros(len(self.document), rows.shape[1], dtype=torch.float64)
        sums.index_add_(0, self.sentence, rows.double())
        return sums / torch.bincount(self.sentence)[:, None]


@dataclass(frozen=True)
class Halves:
    """Both halves of the sentences at a place of the model."""

    names: Names
    """V concepts and values that some sentences of each half have and others do not."""
    first: Half
    """In documents with even numbers: features are chosen, and probes fitted, on these."""
    second: Half
    """In documents with odd numbers: everything is measured on these."""

    def only(self, places: Sequence[int]) -> Halves:
        """With these of the values alone."""
        halves = (
            half._replace(present=half.present[list(places)]) for half in (self.first, self.second)
        )
        return Halves([self.names[place] for place in places], *halves)

    @cached_property
    def first_means(self) -> Tensor:
        """Mean activation of each sentence of the first half, float64 [S, d]."""
        return self.first.means(self.first.states)

    @cached_property
    def second_means(self) -> Tensor:
        """The same of the second half."""
        return self.second.means(self.second.states)

    @cached_property
    def probes(self) -> list[Probe]:
        """For each value a probe of the mean activations, fitted on the first half."""
        return [fit_probe(self.first_means, present) for present in self.first.present]

    @cached_property
    def concepts(self) -> dict[str, list[int]]:
        """The places in `names` of each concept's values."""
        places: dict[str, list[int]] = {}
        for place, (name, _) in enumerate(self.names):
            places.setdefault(name, []).append(place)
        return places


def halves(
    tokens: Tokens,
    document: Tensor,
    values: Sequence[Mapping[str, Any]],
    device: torch.device,
    wanted: Mapping[str, Sequence[str]] | None = None,
) -> Halves:
    """The sentences with a token that counts.

    Args:
        document: int64 [S], the number of each sentence's document.
        values: of each sentence the value of each concept.
        wanted: the values of each concept that count, none for all; None or empty for all concepts.

    Raises:
        DataError: no value is in some sentences of each half and missing in others.
        UsageError: one that is wanted is not.
    """
    odd = (document % 2).bool()[tokens.sentence]
    parts = []
    for chosen in (~odd, odd):
        present, sentence = tokens.sentence[chosen].unique(return_inverse=True)
        rows = [values[n] for n in present.tolist()]
        parts.append((tokens.states[chosen], sentence, rows, document[present]))
    candidates = dict.fromkeys((n, v[n]) for _, _, rows, _ in parts for v in rows for n in v)

    def varies(pair: tuple[str, Any]) -> bool:
        name, value = pair
        return all(len({row[name] == value for row in rows}) == 2 for _, _, rows, _ in parts)

    names = [pair for pair in candidates if varies(pair)]
    if not names:
        raise DataError(
            "no value of a concept is in some sentences and missing in others, in two halves of "
            "the documents: give more documents, or a higher --t-min"
        )
    names = _wanted_names(names, wanted or {})
    first, second = (
        Half(
            states.float().to(device),
            sentence.to(device),
            torch.tensor([[row[n] == v for row in rows] for n, v in names]).to(device),
            number.to(device),
        )
        for states, sentence, rows, number in parts
    )
    return Halves(names, first, second)


def _wanted_names(
    names: list[tuple[str, Any]], wanted: Mapping[str, Sequence[str]]
) -> list[tuple[str, Any]]:
    if not wanted:
        return names
    chosen = []
    for concept, values in wanted.items():
        known = {str(value): (name, value) for name, value in names if name == concept}
        for value in values or known:
            if value not in known:
                break
            chosen.append(known[value])
        else:
            if known:
                continue
        what = f"{concept}={','.join(values)}" if values else concept
        raise UsageError(
            f"--concept {what}: the corpus does not have that in some sentences of each half and "
            f"lack it in others; it has {', '.join(f'{n}={v}' for n, v in names)}"
        )
    return chosen
