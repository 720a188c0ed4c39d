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

from dlmctl.memorization.images.nearest_ratio import (
    distinct,
    memorized,
    ratios,
    shared,
    similarities,
)
from dlmctl.memorization.images.neighbours import Neighbours, nearest
from dlmctl.memorization.images.quality import (
    discrepancy,
    fit_gaussian,
    frechet_distance,
    frechet_error,
    manifolds,
    principal_components,
)
from dlmctl.records.errors import DataError, UsageError
from dlmctl.report.bootstrap import mean_interval, quantile_interval
from dlmctl.settings.memorization import Bootstrap, SampleStudy

AXES = 32
"""Most principal components of the space `auto`, which are at most a quarter of the smallest set.
"""


class ImageSet(NamedTuple):
    """One of the sets."""

    images: Tensor
    """float32 [N, ...], those that are left."""
    places: Tensor
    """int64 [N]: their places in the set that was read."""
    read: int
    """Images of the set that was read."""
    duplicates: int
    """How many of these are copies of earlier ones."""
    features: Tensor | None = None
    """float32 [N, F]."""

    def vectors(self, device: torch.device) -> Tensor:
        """float32 [N, D]."""
        return self.images.flatten(1).to(device)


class ImageSets(NamedTuple):
    """The sets that are compared."""

    samples: ImageSet
    train: ImageSet
    heldout: ImageSet | None
    notes: list[str]
    """What the user has to know about them."""
    unseen: ImageSet | None = None
    """The whole held-out set, for quality; `heldout` has its first images, as many as `train`."""

    @property
    def references(self) -> dict[str, ImageSet]:
        """Training set, and held-out set if there is one, by the prefix of their figures."""
        return {"": self.train, **({"heldout_": self.heldout} if self.heldout else {})}


class Figure(NamedTuple):
    """A number for each reference set."""

    name: str
    values: list[float]
    intervals: list[tuple[float, float]] | None = None
    errors: list[float | None] | None = None
    """Standard errors."""


class StudyResult(NamedTuple):
    """Everything that was measured."""

    figures: list[Figure]
    joint: dict[str, Any]
    """Figures of both reference sets at once."""
    neighbours: list[Neighbours]
    """Of the samples, in each reference set."""
    similarity: list[Tensor]
    """float64 [N] for each reference set; empty without features."""


def compared_sets(
    samples: Tensor, train: Tensor, heldout: Tensor | None, study: SampleStudy
) -> ImageSets:
    """The sets of a study, checked against each other.

    Raises:
        DataError: images of two sizes, or fewer than two of training.
    """
    named = {"--samples": samples, "--train": train}
    named.update({} if heldout is None else {"--heldout": heldout})
    for name, images in named.items():
        if images.shape[1:] != train.shape[1:]:
            raise DataError(
                f"{name} has images of {_shape(images)}, and --train of {_shape(train)}"
            )
    notes: list[str] = []
    known = _reference_set("--train", train, study, notes)
    if len(known.images) < 2:
        raise DataError("--train needs two different images for a ratio of distances")
    own = ImageSet(samples, torch.arange(len(samples)), len(samples), 0)
    if heldout is None:
        return ImageSets(own, known, None, notes)
    fresh = _reference_set("--heldout", heldout, study, notes)
    count = len(known.images)
    if len(fresh.images) < count:
        notes.append(
            f"--heldout has {len(fresh.images)} images and --train {count}: fewer images lie "
            "further away for that reason alone, so that figures of the two do not quite compare"
        )
    if len(fresh.images) > count:
        notes.append(
            f"--heldout has {len(fresh.images)} images: distances are to the first {count}, as "
            "many as --train has, and quality is against all"
        )
    if both := shared(known.images.flatten(1), fresh.images.flatten(1)):
        notes.append(f"{both} of the held-out images are in --train, too: they are not held out")
    return ImageSets(own, known, _first(fresh, count), notes, fresh)


def _first(images: ImageSet, count: int) -> ImageSet:
    """The first images of a set."""
    features = None if images.features is None else images.features[:count]
    return images._replace(
        images=images.images[:count], places=images.places[:count], features=features
    )


def _reference_set(name: str, images: Tensor, study: SampleStudy, notes: list[str]) -> ImageSet:
    """A reference set, without its duplicates if these are to be left out."""
    tolerance = study.tolerance if study.dedup else 0.0
    kept = distinct(images.flatten(1), tolerance, study.memory_bytes)
    duplicates = len(images) - len(kept)
    if duplicates and study.dedup:
        notes.append(f"{duplicates} duplicates in {name} are left out")
    elif duplicates:
        notes.append(
            f"{name} has {duplicates} duplicates: a copy of an image that is there twice "
            "has the ratio 1 and does not count as memorized; --dedup leaves them out"
        )
    places = kept if study.dedup else torch.arange(len(images))
    return ImageSet(images[places], places, len(images), duplicates)


def with_features(sets: ImageSets, features: Callable[[str, ImageSet], Tensor]) -> ImageSets:
    """The sets with the features that a function returns for each, given its name."""

    def encoded(name: str, part: ImageSet) -> ImageSet:
        return part._replace(features=features(name, part))

    samples, train = encoded("samples", sets.samples), encoded("train", sets.train)
    if sets.unseen is None:
        return sets._replace(samples=samples, train=train)
    unseen = encoded("heldout", sets.unseen)
    heldout = _first(unseen, len(train.images))
    return sets._replace(samples=samples, train=train, heldout=heldout, unseen=unseen)


def study_samples(
    sets: ImageSets, study: SampleStudy, bootstrap: Bootstrap, device: torch.device
) -> StudyResult:
    """All figures.

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
    features, alike = sets.samples.features, []
    if features is not None:
        alike = [
            similarities(features, each.features, memory, device)
            for each in references
            if each.features is not None
        ]
        figures += [mean("sim", alike), quantile("sim_p95", alike, 0.95)]
        figures.append(Figure("sim_max", [float(each.max()) for each in alike]))
        for least in study.copy_thresholds:
            over = [(each > least).double() for each in alike]
            figures.append(mean(f"sim_over_{least:g}", over))
    # 3. Quality in a space of features.
    if study.quality:
        name, vectors = _space(sets, study.space, device)
        joint |= {"space": name, "k": study.k}
        titles = ["--samples", "--train", "--heldout"][: len(vectors)]
        for each, title in zip(vectors, titles, strict=True):
            if len(each) <= study.k:
                raise DataError(
                    f"{title} has {len(each)} images, and quality with -k {study.k} needs more "
                    f"than {study.k}: give more, or --no-quality"
                )
        normals = [
            fit_gaussian(each, title, study.ridge)
            for each, title in zip(vectors, titles, strict=True)
        ]
        distances = [frechet_distance(normals[0], each) for each in normals[1:]]
        errors = [frechet_error(vectors[0], each, bootstrap.seed) for each in vectors[1:]]
        figures.append(Figure("fd", distances, errors=errors))
        if len(normals) > 2:
            joint["fd_train_heldout"] = frechet_distance(normals[1], normals[2])
        inside = [manifolds(vectors[0], each, study.k, memory) for each in vectors[1:]]
        for place, title in enumerate(("precision", "recall", "density", "coverage")):
            figures.append(mean(title, [each[place] for each in inside]))
        # As many as of training, between which the test exchanges.
        heldout = vectors[2][: len(vectors[1])] if len(vectors) > 2 else None
        mmd = discrepancy(
            vectors[0], vectors[1], heldout, bootstrap.resamples, bootstrap.seed, memory
        )
        figures.append(Figure("mmd2", [v for v in (mmd.train, mmd.heldout) if v is not None]))
        joint["mmd_width"] = mmd.width
        if mmd.gap is not None:
            joint["mmd2_gap"], joint["mmd2_gap_p"] = mmd.gap, mmd.p
    return StudyResult(figures, joint, near, alike)


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
        yield row


def _space(sets: ImageSets, name: str, device: torch.device) -> tuple[str, list[Tensor]]:
    """Name of the space of features; samples and references in it, float64 [N, K] each."""
    parts = [sets.samples, sets.train, *([sets.unseen] if sets.unseen else [])]
    features = [part.features for part in parts if part.features is not None]
    if name == "auto":
        smallest = min(len(part.images) for part in parts)
        axes = min(AXES, max(1, smallest // 4), sets.train.images[0].numel())
        name = "features" if features else f"pca:{axes}"
    if name == "features":
        if not features:
            raise UsageError("--space features needs --extractor, or files of features")
        return name, [each.to(device).double() for each in features]
    vectors = [part.vectors(device).double() for part in parts]
    if name == "pixels":
        return name, vectors
    kind, _, number = name.partition(":")
    if kind != "pca" or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--space {name} is none of auto, pixels, features, pca:K")
    # Of both references together: axes of one alone would favour it.
    project = principal_components(torch.cat(vectors[1:]), int(number))
    return name, [project(each) for each in vectors]


def _shape(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))
