"""Samples of a generative model compared with its training set and a held-out set.

Every figure is taken twice, in the same way, against either set. The distance to the second nearest
image depends on how many images there are: for distances a larger held-out set is cut to the size
of the training set. Quality is against all held-out images, of which more say more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.images.compared_sets import ImageSets
from dlmctl.memorization.images.nearest_ratio import memorized, ratios, similarities
from dlmctl.memorization.images.neighbours import Neighbours, nearest
from dlmctl.memorization.images.sample_quality import Figure, quality
from dlmctl.report.bootstrap import mean_interval, quantile_interval
from dlmctl.settings.memorization import Bootstrap, SampleStudy


class StudyResult(NamedTuple):
    """Everything that was measured."""

    figures: list[Figure]
    joint: dict[str, Any]
    """Figures of both reference sets at once."""
    neighbours: list[Neighbours]
    """Of the samples, in each reference set."""
    similarity: list[Tensor]
    """float64 [N] for each reference set; empty without features."""
    perceptual: list[Tensor]
    """float64 [N] for each reference set, LPIPS to the nearest image; empty without LPIPS."""


def study_samples(
    sets: ImageSets,
    study: SampleStudy,
    bootstrap: Bootstrap,
    device: torch.device,
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> StudyResult:
    """All figures.

    Args:
        lpips: from images and others, [N, ...] each, to the distances of the pairs, float64 [N].

    Raises:
        DataError: the sets are too small for one of them, or a covariance is singular.
    """
    memory, references = study.memory_bytes, sets.references.values()

    def mean(name: str, values: Sequence[Tensor]) -> Figure:
        means = [float(each.double().mean()) for each in values]
        return Figure(name, means, [mean_interval(each, bootstrap) for each in values])

    def quantile(name: str, values: Sequence[Tensor], at: float) -> Figure:
        quantiles = [float(each.quantile(at)) for each in values]
        intervals = [quantile_interval(each, at, bootstrap) for each in values]
        return Figure(name, quantiles, intervals)

    # 1. Distances of pixels.
    x = sets.samples.vectors(device)
    near = [nearest(x, each.vectors(device), 2, memory) for each in references]
    tests = [memorized(each, study.threshold).double() for each in near]
    first = [each.distances[:, 0] for each in near]
    figures = [mean("f_mem", tests)]
    if (limit := study.distance) is not None:
        figures.append(mean("f_near", [(each <= limit).double() for each in first]))
    figures += [mean("ratio", [ratios(each) for each in near]), mean("d1", first)]
    figures.append(quantile("d1_p05", first, 0.05))
    joint: dict[str, Any] = {}
    if len(tests) > 1:
        joint["f_mem_excess"] = float((tests[0] - tests[1]).mean())
        joint["f_mem_excess_interval"] = mean_interval(tests[0] - tests[1], bootstrap)
    # 2. Cosines of features.
    known, alike = sets.samples.features, []
    if name := next((each for each in ("sscd", "features") if each in known), None):
        alike = [
            similarities(known[name], each.features[name], memory, device) for each in references
        ]
        figures += [mean("sim", alike), quantile("sim_p95", alike, 0.95)]
        figures.append(Figure("sim_max", [float(each.max()) for each in alike]))
        for least in study.copy_thresholds:
            over = [(each > least).double() for each in alike]
            figures.append(mean(f"sim_over_{least:g}", over))
    # 3. LPIPS to the image that is nearest by pixels.
    perceptual = []
    if lpips:
        perceptual = [
            lpips(sets.samples.images, part.images[each.indices[:, 0]])
            for part, each in zip(references, near, strict=True)
        ]
        figures += [mean("lpips", perceptual), quantile("lpips_p05", perceptual, 0.05)]
    # 4. Quality in a space of features.
    if study.quality:
        more, both = quality(sets, study, bootstrap, device)
        figures, joint = figures + more, joint | both
    return StudyResult(figures, joint, near, alike, perceptual)


def summary(sets: ImageSets, result: StudyResult, study: SampleStudy) -> dict[str, Any]:
    """One flat record of the sets and all figures; those of the held-out set have the prefix
    `heldout_`."""
    row: dict[str, Any] = {"samples": len(sets.samples.images)}
    row.update({"train": len(sets.train.images), "duplicates": sets.train.duplicates})
    if sets.heldout:
        row["heldout"] = len(sets.heldout.images)
        row["heldout_duplicates"] = sets.heldout.duplicates
    if sets.unseen:
        row["unseen"] = len(sets.unseen.images)
    row.update({"dedup": study.dedup, "threshold": study.threshold})
    for figure in result.figures:
        for number, prefix in enumerate(sets.references):
            row[prefix + figure.name] = figure.values[number]
            if figure.intervals:
                row[f"{prefix}{figure.name}_interval"] = list(figure.intervals[number])
            if figure.errors:
                row[f"{prefix}{figure.name}_se"] = figure.errors[number]
    row.update(result.joint)
    return row


def sample_rows(sets: ImageSets, result: StudyResult, threshold: float) -> Iterator[dict[str, Any]]:
    """A record for each sample; `nn` is the place of its neighbour in the set as it was read."""
    for number in range(len(sets.samples.images)):
        row: dict[str, Any] = {"id": number}
        for each, (prefix, known) in enumerate(sets.references.items()):
            near = Neighbours(*(part[number : number + 1] for part in result.neighbours[each]))
            row[f"{prefix}nn"] = int(known.places[near.indices[0, 0]])
            row[f"{prefix}d1"], row[f"{prefix}d2"] = near.distances[0].tolist()
            row[f"{prefix}ratio"] = float(ratios(near)[0])
            row[f"{prefix}memorized"] = bool(memorized(near, threshold)[0])
            if result.similarity:
                row[f"{prefix}sim"] = float(result.similarity[each][number])
            if result.perceptual:
                row[f"{prefix}lpips"] = float(result.perceptual[each][number])
        yield row
