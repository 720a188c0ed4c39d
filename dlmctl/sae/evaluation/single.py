"""How well single features identify the value of a concept, compared with untrained directions.

The unit is a sentence: the score of a feature is its largest activation on the tokens of the
sentence that count. For each value of a concept, against its other values, the feature with the
highest AUROC is chosen on the sentences of every other document, and its AUROC is measured on the
rest: the best of 16,384 features always looks good on the sentences that it was chosen on.

    sae       latents
    pca       all principal directions of the activations, and their opposites
    neurons   coordinates of the activations, and their opposites
    random    as many directions as the autoencoder has latents, uniform on the sphere
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.float32_products import whole_products
from dlmctl.report.auroc import auroc
from dlmctl.report.estimate import Estimate, auroc_estimate, mean_estimate
from dlmctl.sae.chunks import encoded
from dlmctl.sae.evaluation.halves import Half, Halves
from dlmctl.sae.topk import TopKSae, random_directions

NUMBERS_PER_CHUNK = 2**23
"""Products of features × tokens (or sentences) in memory at once."""
CLEAR = 0.95
"""AUROC above which a value counts as identified by a single feature."""

Scores = Callable[[Tensor], Tensor]
"""From the numbers of C features, int64 [C], to their scores for all sentences, float32 [C, S]."""


class Method(NamedTuple):
    """A set of features, the best of which is searched for each value."""

    name: str
    features: int
    """Their number."""
    scores: Callable[[Half], Scores]
    signed: bool = False
    """Whether the second half of the features are the opposites of the first."""


class BestFeatures(NamedTuple):
    """The best feature for each of V values."""

    feature: Tensor
    """int64 [V]."""
    auroc: list[Estimate]
    """For each value, on the sentences that the feature was not chosen on."""


def aurocs(method: Method, half: Half) -> Tensor:
    """The AUROC of every feature for every value, float64 [M, V]."""
    size = max(1, NUMBERS_PER_CHUNK // len(half.states))
    scores = method.scores(half)
    every = torch.arange(method.features, device=half.states.device)
    return torch.cat([auroc(scores(numbers), half.present) for numbers in every.split(size)])


def best_features(method: Method, first: Half, second: Half) -> BestFeatures:
    """For each value the best feature on the first half, and its AUROC on the second."""
    feature = aurocs(method, first).argmax(dim=0)
    scores = method.scores(second)(feature)  # [V, S]
    judged = [auroc_estimate(*pair) for pair in zip(scores, second.present, strict=True)]
    return BestFeatures(feature.cpu(), judged)


def sae_method(sae: TopKSae) -> Method:
    """The latents of an autoencoder."""

    def scores(half: Half) -> Scores:
        codes = encoded(sae, half.states)
        owner = half.sentence[:, None].expand_as(codes.indices)  # [N, K]
        sentences = half.present.shape[1]

        def pooled(features: Tensor) -> Tensor:
            # A feature may be asked for more than once, for several values.
            distinct, again = features.unique(return_inverse=True)  # [C'], [C]
            place = torch.full((sae.d_sae,), -1, device=features.device)
            place[distinct] = torch.arange(len(distinct), device=features.device)
            row = place[codes.indices]  # [N, K], rows of the table, -1 for other features
            wanted = row >= 0
            cell = row[wanted] * sentences + owner[wanted]  # of the flat table [C' S]
            table = codes.values.new_zeros(len(distinct) * sentences)
            table.scatter_reduce_(0, cell, codes.values[wanted], "amax")
            return table.view(-1, sentences)[again]

        return pooled

    return Method("sae", sae.d_sae, scores)


def direction_method(name: str, directions: Tensor, opposites: bool) -> Method:
    """The products of the activations with directions [M, d], and with their opposites."""
    rows = torch.cat([directions, -directions]) if opposites else directions

    def scores(half: Half) -> Scores:
        sentences = half.present.shape[1]

        def pooled(features: Tensor) -> Tensor:
            with whole_products():
                products = rows[features] @ half.states.T  # [C, N]
            table = products.new_full((len(features), sentences), -torch.inf)
            owner = half.sentence.expand_as(products)
            return table.scatter_reduce_(1, owner, products, "amax")

        return pooled

    return Method(name, len(rows), scores, opposites)


def baseline_methods(first: Half, latents: int, seed: int) -> Iterator[Method]:
    """What an autoencoder with this number of latents is compared with."""
    width, device = first.states.shape[1], first.states.device
    states = first.states.double()
    _, vectors = torch.linalg.eigh((states - states.mean(dim=0)).T.cov())
    yield direction_method("pca", vectors.T.flip(0).float(), True)
    yield direction_method("neurons", torch.eye(width, device=device), True)
    # Without opposites, which are as likely as the directions themselves.
    yield direction_method("random", random_directions(latents, width, seed).to(device), False)


def result_rows(method: Method, halves: Halves) -> list[dict[str, Any]]:
    """A record for each value, followed by a summary of all values."""
    second = halves.second
    best = best_features(method, halves.first, second)
    rows: list[dict[str, Any]] = []
    positives = second.present.sum(dim=1).tolist()
    for n, (concept, value) in enumerate(halves.names):
        number, sign = int(best.feature[n]), 1
        if method.signed and number >= method.features // 2:
            number, sign = number - method.features // 2, -1
        rows.append(
            {
                "concept": concept,
                "value": value,
                "method": method.name,
                "chosen_by": "auroc",
                "feature": number,
                "sign": sign,
                "auroc": best.auroc[n].value,
                "auroc_se": best.auroc[n].error(second.document),
                "sentences": second.present.shape[1],
                "positives": positives[n],
            }
        )
    mean = mean_estimate(best.auroc)
    rows.append(
        {
            "method": method.name,
            "values": len(rows),
            "auroc": mean.value,
            "auroc_se": mean.error(second.document),
            "clear": sum(one.value > CLEAR for one in best.auroc) / len(best.auroc),
        }
    )
    return rows
