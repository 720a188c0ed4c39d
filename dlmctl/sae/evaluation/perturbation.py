"""Targeted probe perturbation: do a value's latents carry this value alone? (measure `tpp`)

A probe of each value is fitted on the mean activations of sentences. The n latents that speak most
for value a are ablated in the activations, and the accuracy of all probes is measured again:

    effect_j = max(0, mean z_j with a - mean z_j without a) * (W_dec_j . w_a)
    TPP_a(n) = fall of a's accuracy - mean fall of the accuracies of the concept's other values

(Marks et al. 2024, as SAEBench has it: arXiv 2411.18895 and 2503.09532). It is 1 - chance at best,
and 0 for latents that matter to no probe or to all. What differs: the classes are the values of one
concept, of which there are at least three (with two, both probes draw one boundary and TPP is
always 0); all sentences count and the two labels weigh the same, where SAEBench draws as many of
either; a probe has an L2 penalty. The untrained dictionary (`random`) is treated the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dlmctl.records.errors import DataError
from dlmctl.report.estimate import Estimate, mean_estimate, stratified_mean
from dlmctl.sae.evaluation.halves import Halves
from dlmctl.sae.evaluation.sentence_codes import (
    Dictionary,
    dictionaries,
    signed_weights,
    strongest,
)
from dlmctl.sae.topk import TopKSae


class Fall(NamedTuple):
    """What ablating latents of a value does."""

    clean: Estimate
    """Accuracy of the value's probe before."""
    intended: Estimate
    """Its fall."""
    unintended: Estimate
    """Mean fall of the other values' accuracies."""

    @property
    def tpp(self) -> Estimate:
        return self.intended - self.unintended


def tpp_rows(
    sae: TopKSae, halves: Halves, sizes: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each value, method and number of latents; then the means over the values.

    Args:
        sizes: numbers of latents.
        seed: of the untrained dictionary.

    Raises:
        DataError: no concept has three values.
    """
    concepts = [places for places in halves.concepts.values() if len(places) > 2]
    if not concepts:
        raise DataError("tpp is about concepts with three values or more, and there is none")
    for one in dictionaries(sae, halves, seed):
        falls: dict[int, list[Fall]] = {size: [] for size in sizes}
        for places in concepts:
            for place in places:
                order = _latents(one, halves, place)
                for size in sizes:
                    falls[size].append(_fall(one, halves, place, places, order[:size]))
                    concept, value = halves.names[place]
                    row = {"concept": concept, "value": value, "method": one.method, "top": size}
                    yield row | _measures(falls[size][-1], halves)
        for size, of_size in falls.items():
            mean = Fall(*(mean_estimate(column) for column in zip(*of_size, strict=True)))
            row = {"method": one.method, "top": size, "values": len(of_size)}
            yield row | _measures(mean, halves)


def _latents(one: Dictionary, halves: Halves, place: int) -> Tensor:
    """The latents that speak for a value, the strongest first."""
    difference = one.first.weighted(signed_weights(halves.first.present[place])).clamp(min=0)
    effects = difference * one.slopes(halves.probes[place])
    return strongest(effects, len(effects))


def _fall(
    one: Dictionary, halves: Halves, place: int, places: Sequence[int], features: Tensor
) -> Fall:
    ablated = one.ablated(halves.second_means, features)
    clean = {n: _accuracy(halves, n, halves.second_means) for n in places}
    falls = {n: clean[n] - _accuracy(halves, n, ablated) for n in places}
    others = mean_estimate([falls[n] for n in places if n != place])
    return Fall(clean[place], falls[place], others)


def _accuracy(halves: Halves, place: int, means: Tensor) -> Estimate:
    present = halves.second.present[place]
    said = halves.probes[place].scores(means) > 0
    return stratified_mean(said == present, present.long())


def _measures(fall: Fall, halves: Halves) -> dict[str, Any]:
    return {
        "tpp": fall.tpp.value,
        "tpp_se": fall.tpp.error(halves.second.document),
        "intended": fall.intended.value,
        "unintended": fall.unintended.value,
        "accuracy": fall.clean.value,
    }
