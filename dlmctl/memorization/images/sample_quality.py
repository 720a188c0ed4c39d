"""Quality of samples in a space of features, against the training set and all held-out images.

Precision, recall, density, coverage and MMD come first: a Fréchet distance compares two moments
only, and is best judged by that of a control (`controls`) and by its floor, the distance between
the training set and held-out images.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.images.compared_sets import ImageSet, ImageSets
from dlmctl.memorization.images.kernel_distance import kernel_distance
from dlmctl.memorization.images.quality import (
    discrepancy,
    fit_gaussian,
    frechet_distance,
    frechet_error,
    manifolds,
    principal_components,
)
from dlmctl.records.errors import DataError, UsageError
from dlmctl.report.bootstrap import mean_interval
from dlmctl.settings.memorization import Bootstrap, SampleStudy

AXES = 32
"""Most principal components of the space `auto`, which are at most a quarter of the smallest set.
"""
FID, INCEPTION = "fid", "inception"


class Figure(NamedTuple):
    """A number for each reference set."""

    name: str
    values: list[float]
    intervals: list[tuple[float, float]] | None = None
    errors: list[float | None] | None = None
    """Standard errors."""


def quality(
    sets: ImageSets, study: SampleStudy, bootstrap: Bootstrap, device: torch.device
) -> tuple[list[Figure], dict[str, Any]]:
    """Figures against each reference set, and those of both at once.

    Raises:
        UsageError: there is no such space.
        DataError: the sets are too small for one of the figures, or a covariance is singular.
    """
    name, vectors = _space(sets, study.space, device)
    for each, title in zip(vectors, _titles(vectors), strict=True):
        if len(each) <= study.k:
            raise DataError(
                f"{title} has {len(each)} images, and quality with -k {study.k} needs more "
                f"than {study.k}: give more, or --no-quality"
            )
    figures, joint = _neighbourhoods(vectors, study, bootstrap)
    joint = {"space": name, "k": study.k, **joint}
    if parts := _features(sets, INCEPTION, device):
        more, both = _inception(parts, study, bootstrap)
        figures, joint = figures + more, joint | both
    if name != INCEPTION:
        more, both = _frechet("fd", vectors, study.ridge, bootstrap)
        figures, joint = figures + more, joint | both
    return figures, joint


def _neighbourhoods(
    vectors: list[Tensor], study: SampleStudy, bootstrap: Bootstrap
) -> tuple[list[Figure], dict[str, Any]]:
    """Precision, recall, density, coverage, and MMD by a Gaussian kernel."""
    memory, figures = study.memory_bytes, []
    inside = [manifolds(vectors[0], each, study.k, memory) for each in vectors[1:]]
    for place, title in enumerate(("precision", "recall", "density", "coverage")):
        values = [each[place] for each in inside]
        intervals = [mean_interval(each, bootstrap) for each in values]
        figures.append(Figure(title, [float(each.mean()) for each in values], intervals))
    # As many as of training, between which the test exchanges.
    heldout = vectors[2][: len(vectors[1])] if len(vectors) > 2 else None
    mmd = discrepancy(vectors[0], vectors[1], heldout, bootstrap.resamples, bootstrap.seed, memory)
    figures.append(Figure("mmd2", [v for v in (mmd.train, mmd.heldout) if v is not None]))
    joint: dict[str, Any] = {"mmd_width": mmd.width}
    if mmd.gap is not None:
        joint["mmd2_gap"], joint["mmd2_gap_p"] = mmd.gap, mmd.p
    return figures, joint


def _inception(
    vectors: list[Tensor], study: SampleStudy, bootstrap: Bootstrap
) -> tuple[list[Figure], dict[str, Any]]:
    """KID and FID."""
    size = min(study.kid_subset_size, *map(len, vectors))
    kid = [
        kernel_distance(vectors[0], each, study.kid_subsets, size, bootstrap.seed)
        for each in vectors[1:]
    ]
    figures = [
        Figure("kid", [each.mean for each in kid]),
        Figure("kid_std", [each.std for each in kid]),
    ]
    more, joint = _frechet(FID, vectors, study.ridge, bootstrap)
    return figures + more, {"kid_subset": size, **joint}


def _frechet(
    name: str, vectors: list[Tensor], ridge: float | None, bootstrap: Bootstrap
) -> tuple[list[Figure], dict[str, Any]]:
    """The Fréchet distance to each reference set, and between these.

    Its interval is normal: resamples lie farther apart than the sets, so that their quantiles do
    not contain the distance.
    """
    singular = name == FID  # published values are of whatever covariance there is
    normals = [
        fit_gaussian(each, title, ridge, singular)
        for each, title in zip(vectors, _titles(vectors), strict=True)
    ]
    distances = [frechet_distance(normals[0], each) for each in normals[1:]]
    errors = [frechet_error(vectors[0], each, bootstrap.seed) for each in vectors[1:]]
    intervals = None
    known = [error for error in errors if error is not None]
    if len(known) == len(distances):
        z = NormalDist().inv_cdf((1 + bootstrap.confidence) / 2)
        pairs = zip(distances, known, strict=True)
        intervals = [(max(0.0, far - z * error), far + z * error) for far, error in pairs]
    joint = {}
    if len(normals) > 2:
        joint[f"{name}_train_heldout"] = frechet_distance(normals[1], normals[2])
    return [Figure(name, distances, intervals, errors)], joint


def _space(sets: ImageSets, name: str, device: torch.device) -> tuple[str, list[Tensor]]:
    """Name of the space of features; samples and references in it, float64 [N, K] each."""
    parts, known = _parts(sets), sets.samples.features
    if name == "auto":
        smallest = min(len(part.images) for part in parts)
        axes = min(AXES, max(1, smallest // 4), sets.train.images[0].numel())
        name = next((each for each in ("features", INCEPTION) if each in known), f"pca:{axes}")
    if name in ("features", INCEPTION):
        if name not in known:
            what = "--extractor, or files of features" if name == "features" else "--inception"
            raise UsageError(f"--space {name} needs {what}")
        return name, _features(sets, name, device)
    vectors = [part.vectors(device).double() for part in parts]
    if name == "pixels":
        return name, vectors
    kind, _, number = name.partition(":")
    if kind != "pca" or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--space {name} is none of auto, pixels, features, inception, pca:K")
    # Of both references together: axes of one alone would favour it.
    project = principal_components(torch.cat(vectors[1:]), int(number))
    return name, [project(each) for each in vectors]


def _features(sets: ImageSets, name: str, device: torch.device) -> list[Tensor]:
    """Features of samples and references, float64 [N, F] each; none if they have no such ones."""
    if name not in sets.samples.features:
        return []
    return [part.features[name].to(device).double() for part in _parts(sets)]


def _parts(sets: ImageSets) -> list[ImageSet]:
    """Samples, training set, and held-out set if there is one."""
    return [sets.samples, sets.train, *([sets.unseen] if sets.unseen else [])]


def _titles(vectors: list[Tensor]) -> list[str]:
    return ["--samples", "--train", "--heldout"][: len(vectors)]
