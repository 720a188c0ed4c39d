"""k-sparse probing: how well a few latents identify the value of a concept (measure `sparse`).

A logistic regression on the k latents of a sentence whose mean differs most between sentences with
the value and without it (Gurnee et al. 2023, arXiv 2305.01610), as in SAEBench's `sparse_probing`
(arXiv 2503.09532). Latents are averaged over the tokens of a sentence that count. Latents are
chosen and the probe is fitted on the first half, and measured on the second. SAEBench draws as
many sentences without the value as with it; here all sentences count, and the two labels weigh the
same: `accuracy` is the mean of the accuracies on the sentences with the value and without.

    sae       latents
    random    those of an untrained dictionary with as many latents and active latents
    neurons   coordinates of the activations
    dense     all coordinates of the activations
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from dlmctl.report.estimate import Estimate, auroc_estimate, mean_estimate, stratified_mean
from dlmctl.sae.evaluation.halves import Halves
from dlmctl.sae.evaluation.sentence_codes import Dictionary, dictionaries, signed_weights
from dlmctl.sae.logistic import fit_probe
from dlmctl.sae.topk import TopKSae


class Fit(NamedTuple):
    """How good a probe of some features is on the second half."""

    features: list[int] | None
    """Which; None: all."""
    accuracy: Estimate
    auroc: Estimate


Fits = dict[tuple[str, int | None], Fit]
"""By method and number of features, None being all."""


def sparse_rows(
    sae: TopKSae, halves: Halves, sizes: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each value, method and number of features; then their means over the values.

    Args:
        sizes: numbers of features.
        seed: of the untrained dictionary.
    """
    compared = dictionaries(sae, halves, seed)
    every = [_fits(compared, halves, place, sizes) for place in range(len(halves.names))]
    for (concept, value), fits in zip(halves.names, every, strict=True):
        for row in _rows(fits, halves):
            yield {"concept": concept, "value": value, **row}
    means = {
        key: Fit(
            None,
            mean_estimate([fits[key].accuracy for fits in every]),
            mean_estimate([fits[key].auroc for fits in every]),
        )
        for key in every[0]
    }
    for row in _rows(means, halves):
        yield {**row, "values": len(every)}


def _fits(compared: Sequence[Dictionary], halves: Halves, place: int, sizes: Sequence[int]) -> Fits:
    """The probes of one value."""
    first, second = halves.first.present[place], halves.second.present[place]
    weights, fits = signed_weights(first), Fits()
    for one in compared:
        order = one.first.weighted(weights).abs().argsort(descending=True, stable=True)
        for size in sizes:
            features = order[:size]
            rows = one.first.means(features), one.second.means(features)
            probe = fit_probe(rows[0], first)
            fits[one.method, size] = _fit(features, probe.scores(rows[1]), second)
    order = (weights @ halves.first_means).abs().argsort(descending=True, stable=True)
    for size in sizes:
        features = order[:size]
        probe = fit_probe(halves.first_means[:, features], first)
        scores = probe.scores(halves.second_means[:, features])
        fits["neurons", size] = _fit(features, scores, second)
    fits["dense", None] = _fit(None, halves.probes[place].scores(halves.second_means), second)
    return fits


def _fit(features: Tensor | None, scores: Tensor, present: Tensor) -> Fit:
    return Fit(
        None if features is None else features.tolist(),
        stratified_mean((scores > 0) == present, present.long()),
        auroc_estimate(scores, present),
    )


def _rows(fits: Fits, halves: Halves) -> Iterator[dict[str, Any]]:
    document = halves.second.document
    for (method, top), fit in fits.items():
        row = {
            "method": method,
            "top": top,
            "accuracy": fit.accuracy.value,
            "accuracy_se": fit.accuracy.error(document),
            "auroc": fit.auroc.value,
            "auroc_se": fit.auroc.error(document),
        }
        if method == "sae":
            above = fit.accuracy - fits["random", top].accuracy
            row |= {"above_random": above.value, "above_random_se": above.error(document)}
        yield row if fit.features is None else {**row, "features": fit.features}
