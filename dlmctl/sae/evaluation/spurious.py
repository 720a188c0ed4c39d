"""Spurious correlation removal: can a concept be taken out of a probe's input? (measure `scr`)

Take two values of each of two concepts, A (as topic: sport, science) and B (tense: past, future).
Where only the sentences with the first value of both and the second of both are kept, A and B
coincide, and a probe that is fitted there is `biased`: it may look at either. To make it a probe of
A, the n latents that matter most to B are ablated in the activations:

    effect_j = |mean z_j with B's first value - mean z_j with its second| * |W_dec_j . w_B|
    SCR(n)   = (after - before) / (unbiased - before)

where w_B is an unbiased probe of B, before and after are the accuracies of the biased probe for A
on sentences in which all four combinations weigh the same, and unbiased is that of a probe of A
which was fitted on such sentences (Marks et al. 2024, as SAEBench has it: arXiv 2411.18895
and 2503.09532). 1 is a removal without trace, 0 none, and below 0 ablation hurts A more than B.
Both concepts of a pair have a turn as A. SAEBench counts the one for which the biased probe is less
accurate, which is `main` here. What differs: sentences in place of texts; the four combinations are
weighted, where SAEBench draws as many of each; a probe has an L2 penalty; and the summary is the
ratio of the mean differences over the pairs, where SAEBench has the mean of the ratios, as a pair
with a good biased probe has next to nothing to divide by.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.records.errors import DataError
from dlmctl.report.estimate import Estimate, mean_estimate, stratified_mean
from dlmctl.sae.evaluation.halves import Half, Halves
from dlmctl.sae.evaluation.sentence_codes import (
    Dictionary,
    dictionaries,
    signed_weights,
    strongest,
)
from dlmctl.sae.logistic import fit_probe
from dlmctl.sae.topk import TopKSae


class Crossed(NamedTuple):
    """The S' sentences of a half that have one of two values of both of two concepts."""

    chosen: Tensor
    """int64 [S'], their numbers."""
    labels: Tensor
    """bool [2, S'], whether they have the first of the two values of each concept."""

    @property
    def combination(self) -> Tensor:
        """int64 [S'], which of the four combinations."""
        return self.labels[0] * 2 + self.labels[1].long()


class Removal(NamedTuple):
    """Accuracies for concept A of a pair."""

    biased: Estimate
    """Of the biased probe."""
    unbiased: Estimate
    """Of an unbiased probe."""
    after: Estimate
    """Of the biased probe, without latents of concept B."""

    @property
    def scr(self) -> Estimate | None:
        """None if the biased probe is as good as the unbiased one: there is nothing to remove."""
        room = self.unbiased - self.biased
        return (self.after - self.biased).over(room) if room.value > 0 else None

    def measures(self, document: Tensor) -> dict[str, Any]:
        """As they stand in a row; `document` is int64 [S], that of each sentence."""
        scr = self.scr
        return {
            "scr": None if scr is None else scr.value,
            "scr_se": None if scr is None else scr.error(document),
            "accuracy": self.after.value,
            "biased": self.biased.value,
            "unbiased": self.unbiased.value,
        }


def scr_rows(
    sae: TopKSae, halves: Halves, sizes: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each pair of concepts in both orders, method and number of latents; then means.

    The means are over the rows that are `main`. Pairs of which a half lacks a combination of values
    are left out.

    Args:
        sizes: numbers of latents.
        seed: of the untrained dictionary.

    Raises:
        DataError: there is no pair.
    """
    pairs = [places[:2] for places in halves.concepts.values() if len(places) > 1]
    crossed = {
        (tuple(a), tuple(b)): [_crossed(half, a, b) for half in (halves.first, halves.second)]
        for a, b in combinations(pairs, 2)
    }
    whole = {
        pair: both
        for pair, both in crossed.items()
        if all(len(one.combination.unique()) == 4 for one in both)
    }
    if not whole:
        raise DataError(
            "scr is about two concepts with two values each, in all four combinations in both "
            "halves of the texts: there are no such concepts"
        )
    for one in dictionaries(sae, halves, seed):
        main: dict[int, list[Removal]] = defaultdict(list)
        for pair, (first, second) in whole.items():
            for row, removal in _pair_rows(one, halves, pair, first, second, sizes):
                yield row
                if row["main"]:
                    main[row["top"]].append(removal)
        for size, removals in main.items():
            mean = Removal(*(mean_estimate(column) for column in zip(*removals, strict=True)))
            row = {"method": one.method, "top": size, "pairs": len(removals)}
            yield row | mean.measures(halves.second.document)


def _crossed(half: Half, a: Sequence[int], b: Sequence[int]) -> Crossed:
    present = half.present
    chosen = (present[list(a)].any(dim=0) & present[list(b)].any(dim=0)).nonzero()[:, 0]
    return Crossed(chosen, torch.stack([present[a[0], chosen], present[b[0], chosen]]))


def _pair_rows(
    one: Dictionary,
    halves: Halves,
    pair: tuple[Sequence[int], Sequence[int]],
    first: Crossed,
    second: Crossed,
    sizes: Sequence[int],
) -> Iterator[tuple[dict[str, Any], Removal]]:
    """The rows of a pair, each with its accuracies."""
    removals = _removals(one, halves, first, second, sizes)
    worse = min((0, 1), key=lambda concept: removals[concept, sizes[0]].biased.value)
    for (target, size), removal in removals.items():
        names, others = ([halves.names[n] for n in pair[c]] for c in (target, 1 - target))
        row = {
            "concept": names[0][0],
            "values": [value for _, value in names],
            "spurious": others[0][0],
            "spurious_values": [value for _, value in others],
            "method": one.method,
            "top": size,
            "main": target == worse,
            "sentences": len(second.chosen),
        }
        yield row | removal.measures(halves.second.document), removal


def _removals(
    one: Dictionary, halves: Halves, first: Crossed, second: Crossed, sizes: Sequence[int]
) -> dict[tuple[int, int], Removal]:
    """By the concept whose accuracy is measured, 0 or 1, and the number of latents ablated."""
    x = halves.first_means[first.chosen]
    together = first.labels[0] == first.labels[1]
    biased = fit_probe(x[together], first.labels[0, together])
    probes = [fit_probe(x, labels, first.combination) for labels in first.labels]
    total = len(halves.second.document)

    def accuracy(scores: Tensor, target: int) -> Estimate:
        right = (scores > 0) == second.labels[target]
        part = stratified_mean(right, second.combination)
        influence = part.influence.new_zeros(total).index_copy_(0, second.chosen, part.influence)
        return Estimate(part.value, influence)

    y = halves.second_means[second.chosen]
    removals = {}
    for target in (0, 1):
        spurious = 1 - target
        weights = signed_weights(first.labels[spurious], first.combination)
        in_half = weights.new_zeros(len(halves.first.document)).index_copy_(
            0, first.chosen, weights
        )
        contrast = one.first.weighted(in_half)
        effects = (contrast * one.slopes(probes[spurious])).abs()
        before = accuracy(biased.scores(y), target)
        unbiased = accuracy(probes[target].scores(y), target)
        for size in sizes:
            ablated = one.ablated(halves.second_means, strongest(effects, size))[second.chosen]
            after = accuracy(biased.scores(ablated), target)
            removals[target, size] = Removal(before, unbiased, after)
    return removals
