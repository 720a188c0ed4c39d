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

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.float32_products import whole_products
from dlmctl.records.errors import DataError
from dlmctl.report.auroc import auroc
from dlmctl.sae.evaluation.placed import PlacedSae
from dlmctl.sae.evaluation.sentences import Labelled, Place, Tokens
from dlmctl.sae.topk import TopKSae, join_codes

NUMBERS_PER_CHUNK = 2**23
"""Products of features × tokens (or sentences) in memory at once."""
CLEAR = 0.95
"""AUROC above which a value counts as identified by a single feature."""

Scores = Callable[[Tensor], Tensor]
"""From the numbers of C features, int64 [C], to their scores for all sentences, float32 [C, S]."""


class Half(NamedTuple):
    """S sentences with N tokens that count."""

    states: Tensor
    """float32 [N, d]."""
    sentence: Tensor
    """int64 [N], each of 0 to S - 1 at least once."""
    present: Tensor
    """bool [V, S], which sentences have which value."""


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
    auroc: Tensor
    """float64 [V], on the sentences that the feature was not chosen on."""


def halves(
    tokens: Tokens,
    document: Tensor,
    values: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> tuple[list[tuple[str, Any]], Half, Half]:
    """The sentences with a token that counts, in documents with even and with odd numbers.

    Returns:
        The concepts and values that some sentences of each half have and others do not; both
        halves.

    Raises:
        DataError: there is no such value.
    """
    odd = (document % 2).bool()[tokens.sentence]
    parts = []
    for chosen in (~odd, odd):
        present, sentence = tokens.sentence[chosen].unique(return_inverse=True)
        parts.append((tokens.states[chosen], sentence, [values[n] for n in present.tolist()]))
    candidates = dict.fromkeys((name, v[name]) for *_, rows in parts for v in rows for name in v)

    def varies(pair: tuple[str, Any]) -> bool:
        name, value = pair
        return all(len({row[name] == value for row in rows}) == 2 for *_, rows in parts)

    names = [pair for pair in candidates if varies(pair)]
    if not names:
        raise DataError(
            "no value of a concept is in some sentences and missing in others, in two halves of "
            "the documents: give more documents, or a higher --t-min"
        )
    first, second = (
        Half(
            states.float().to(device),
            sentence.to(device),
            torch.tensor([[row[n] == v for row in rows] for n, v in names]).to(device),
        )
        for states, sentence, rows in parts
    )
    return names, first, second


def best_features(method: Method, first: Half, second: Half) -> BestFeatures:
    """For each value the best feature on the first half, and its AUROC on the second."""
    device = first.states.device
    size = max(1, NUMBERS_PER_CHUNK // len(first.states))
    scores = method.scores(first)
    best = torch.full((len(first.present),), -1.0, dtype=torch.float64, device=device)
    feature = torch.zeros(len(best), dtype=torch.int64, device=device)
    for numbers in torch.arange(method.features, device=device).split(size):
        value, place = auroc(scores(numbers), first.present).max(dim=0)
        feature = torch.where(value > best, numbers[place], feature)
        best = torch.maximum(value, best)
    judged = auroc(method.scores(second)(feature), second.present)
    return BestFeatures(feature.cpu(), judged.diagonal().cpu())


def sae_method(sae: TopKSae) -> Method:
    """The latents of an autoencoder."""

    def scores(half: Half) -> Scores:
        rows = max(1, NUMBERS_PER_CHUNK // sae.d_sae)
        with torch.no_grad():
            codes = join_codes([sae.encode(part) for part in half.states.split(rows)])
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
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(latents, width, generator=generator)
    # Without opposites, which are as likely as the directions themselves.
    yield direction_method("random", (drawn / drawn.norm(dim=1, keepdim=True)).to(device), False)


def probe(
    saes: Sequence[PlacedSae],
    sentences: Labelled,
    seed: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """A row for each autoencoder, method and value; the rows of a method end with a summary.

    Args:
        seed: of the random directions.

    Raises:
        DataError: the labels do not vary.
    """
    baselines: dict[tuple[Place, int], list[tuple[Method, BestFeatures]]] = {}
    for placed in saes:
        sae, place = placed.sae, (placed.layer, placed.positions)
        names, first, second = halves(
            sentences.tokens[place], sentences.document, sentences.values, device
        )
        latents = sae_method(sae)
        results = [(latents, best_features(latents, first, second))]
        if (place, sae.d_sae) not in baselines:
            baselines[place, sae.d_sae] = [
                (method, best_features(method, first, second))
                for method in baseline_methods(first, sae.d_sae, seed)
            ]
        for method, best in [*results, *baselines[place, sae.d_sae]]:
            for row in result_rows(method, names, best, second):
                yield {**placed.about, **row}


def result_rows(
    method: Method, names: Sequence[tuple[str, Any]], best: BestFeatures, second: Half
) -> list[dict[str, Any]]:
    """A record for each value, followed by a summary of all values."""
    rows: list[dict[str, Any]] = []
    aurocs = best.auroc.tolist()
    positives = second.present.sum(dim=1).tolist()
    for n, (concept, value) in enumerate(names):
        number, sign = int(best.feature[n]), 1
        if method.signed and number >= method.features // 2:
            number, sign = number - method.features // 2, -1
        rows.append(
            {
                "concept": concept,
                "value": value,
                "method": method.name,
                "feature": number,
                "sign": sign,
                "auroc": aurocs[n],
                "sentences": second.present.shape[1],
                "positives": positives[n],
            }
        )
    mean = sum(aurocs) / len(aurocs)
    clear = sum(value > CLEAR for value in aurocs) / len(aurocs)
    rows.append({"method": method.name, "values": len(names), "auroc": mean, "clear": clear})
    return rows
