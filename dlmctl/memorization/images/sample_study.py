"""Samples of a generative model beside its training set and a held-out set of equal size.

Every figure is taken twice, in the same way, against either set. How near the second nearest image
is depends on how many there are, so that the sets should be of one size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.images.nearest_ratio import (
    THRESHOLD,
    Bootstrap,
    distinct,
    memorized,
    ratios,
    shared,
    similarities,
)
from dlmctl.memorization.images.neighbours import MEMORY, Neighbours, nearest
from dlmctl.memorization.images.quality import (
    discrepancy,
    frechet_distance,
    gaussian,
    manifolds,
    principal_components,
)
from dlmctl.records.errors import DataError, UsageError

AXES = 32
"""Principal components where nothing else is asked for, or a quarter of the smallest set."""


@dataclass(frozen=True)
class Study:
    """What is measured, and how."""

    threshold: float = THRESHOLD
    distance: float | None = None
    """L2 below which a sample counts as a copy, too; None is not asked for."""
    copy_thresholds: tuple[float, ...] = (0.5, 0.6)
    """Cosines above which features are those of a copy."""
    dedup: bool = False
    tolerance: float = 0.0
    """L2 within which images are duplicates."""
    quality: bool = True
    space: str = "auto"
    """pixels, pca:K, features; or auto, features where there are such, else pca."""
    ridge: float | None = None
    k: int = 5
    """Neighbours of precision, recall, density and coverage."""
    bootstrap: Bootstrap = field(default_factory=Bootstrap)
    memory: int = MEMORY
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class Part(NamedTuple):
    """One of the sets."""

    images: Tensor
    """float32 [N, ...], those that are left."""
    places: Tensor
    """int64 [N]: where they stand in the set that was read."""
    read: int
    """Images of the set that was read."""
    duplicates: int
    """Of these the copies of earlier ones."""
    features: Tensor | None = None
    """float32 [N, F]."""

    def vectors(self, device: torch.device) -> Tensor:
        """float32 [N, D]."""
        return self.images.flatten(1).to(device)


class Parts(NamedTuple):
    """The sets that are compared."""

    samples: Part
    train: Part
    heldout: Part | None
    notes: list[str]
    """What the user has to know of them."""

    @property
    def references(self) -> dict[str, Part]:
        """Training set, and held-out set where there is one, by the beginning of their figures."""
        return {"": self.train, **({"heldout_": self.heldout} if self.heldout else {})}


class Figure(NamedTuple):
    """A number of each reference set."""

    name: str
    values: list[float]
    intervals: list[tuple[float, float]] | None = None


def part(images: Tensor, study: Study) -> Part:
    """A reference set, without its duplicates where these are to be left out."""
    vectors = images.flatten(1)
    kept = distinct(vectors, study.tolerance if study.dedup else 0.0, study.memory)
    duplicates = len(images) - len(kept)
    places = kept if study.dedup else torch.arange(len(images))
    return Part(images[places], places, len(images), duplicates)


def parts(samples: Tensor, train: Tensor, heldout: Tensor | None, study: Study) -> Parts:
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
    known = part(train, study)
    if len(known.images) < 2:
        raise DataError("--train needs two different images for a ratio of distances")
    _say_duplicates(notes, "--train", known, study)
    own = Part(samples, torch.arange(len(samples)), len(samples), 0)
    if heldout is None:
        return Parts(own, known, None, notes)
    fresh = part(heldout, study)
    _say_duplicates(notes, "--heldout", fresh, study)
    count = len(known.images)
    if len(fresh.images) < count:
        notes.append(
            f"--heldout has {len(fresh.images)} images and --train {count}: fewer lie further away "
            "for that alone, so that figures of the two do not quite compare"
        )
    if len(fresh.images) > count:
        notes.append(f"--heldout is cut from {len(fresh.images)} to {count} images, as --train has")
    fresh = fresh._replace(images=fresh.images[:count], places=fresh.places[:count])
    if both := shared(known.images.flatten(1), fresh.images.flatten(1)):
        notes.append(f"{both} of the held-out images are in --train, too: they are not held out")
    return Parts(own, known, fresh, notes)


def with_features(found: Parts, features: Callable[[str, Part], Tensor]) -> Parts:
    """The same with features of all sets, of which `features` is asked by name."""
    held = found.heldout
    return found._replace(
        samples=found.samples._replace(features=features("samples", found.samples)),
        train=found.train._replace(features=features("train", found.train)),
        heldout=held._replace(features=features("heldout", held)) if held else None,
    )


class Result(NamedTuple):
    """What was found."""

    figures: list[Figure]
    more: dict[str, Any]
    """What is of both sets at once."""
    neighbours: list[Neighbours]
    """Of the samples, in the training set and in the held-out one."""
    similarity: list[Tensor]
    """float64 [N] for each; empty without features."""


def study_samples(found: Parts, study: Study) -> Result:
    """All figures.

    Raises:
        DataError: the sets are too small for one of them, or a covariance is singular.
    """
    device, boot = study.device, study.bootstrap
    x = found.samples.vectors(device)
    near = [nearest(x, each.vectors(device), 2, study.memory) for each in found.references.values()]
    tests = [memorized(each, study.threshold).double() for each in near]
    first = [each.distances[:, 0] for each in near]
    figures = [_mean("f_mem", tests, boot)]
    if (limit := study.distance) is not None:
        figures.append(_mean("f_near", [(each <= limit).double() for each in first], boot))
    figures.append(_mean("ratio", [ratios(each) for each in near], boot))
    figures += [_mean("d1", first, boot), _quantile("d1_p05", first, 0.05, boot)]
    more: dict[str, Any] = {}
    if len(tests) > 1:
        more["f_mem_excess"] = float((tests[0] - tests[1]).mean())
        more["f_mem_excess_interval"] = boot.interval(tests[0] - tests[1])
    alike = _similarity(found, study)
    if alike:
        figures += [_mean("sim", alike, boot), _quantile("sim_p95", alike, 0.95, boot)]
        figures.append(Figure("sim_max", [float(each.max()) for each in alike]))
        for least in study.copy_thresholds:
            over = [(each > least).double() for each in alike]
            figures.append(_mean(f"sim_over_{least:g}", over, boot))
    if study.quality:
        better, beside = _quality(found, study)
        figures += better
        more.update(beside)
    return Result(figures, more, near, alike)


def summary(found: Parts, result: Result, study: Study) -> dict[str, Any]:
    """One flat record of the sets and all figures, those of the held-out set behind `heldout_`."""
    row: dict[str, Any] = {"samples": len(found.samples.images)}
    row.update({"train": len(found.train.images), "duplicates": found.train.duplicates})
    if found.heldout:
        row["heldout"] = len(found.heldout.images)
        row["heldout_duplicates"] = found.heldout.duplicates
    row.update({"dedup": study.dedup, "threshold": study.threshold})
    for figure in result.figures:
        for number, prefix in enumerate(found.references):
            row[prefix + figure.name] = figure.values[number]
            if figure.intervals:
                row[f"{prefix}{figure.name}_interval"] = list(figure.intervals[number])
    row.update(result.more)
    return row


def sample_rows(found: Parts, result: Result, study: Study) -> Iterator[dict[str, Any]]:
    """A record for each sample; `nn` is the place in the set as it was read."""
    for number in range(len(found.samples.images)):
        row: dict[str, Any] = {"id": number}
        for each, (prefix, known) in enumerate(found.references.items()):
            near = result.neighbours[each]
            one = Neighbours(*(held[number : number + 1] for held in near))
            row[f"{prefix}nn"] = int(known.places[one.indices[0, 0]])
            row[f"{prefix}d1"], row[f"{prefix}d2"] = one.distances[0].tolist()
            row[f"{prefix}ratio"] = float(ratios(one)[0])
            row[f"{prefix}memorized"] = bool(memorized(one, study.threshold)[0])
            if result.similarity:
                row[f"{prefix}sim"] = float(result.similarity[each][number])
        yield row


def _say_duplicates(notes: list[str], name: str, found: Part, study: Study) -> None:
    if found.duplicates and not study.dedup:
        notes.append(
            f"{name} has {found.duplicates} duplicates: a copy of an image that is there twice "
            "has the ratio 1 and does not count as memorized; --dedup leaves them out"
        )
    elif found.duplicates:
        notes.append(f"{found.duplicates} duplicates in {name} are left out")


def _similarity(found: Parts, study: Study) -> list[Tensor]:
    own = found.samples.features
    if own is None:
        return []
    return [
        similarities(own, each.features, study.memory, study.device)
        for each in found.references.values()
        if each.features is not None
    ]


def _space(found: Parts, study: Study) -> tuple[str, list[Tensor]]:
    """Name of the space of features, and samples and references in it, float64."""
    sets = [found.samples, *found.references.values()]
    name, featured = study.space, found.samples.features is not None
    if name == "auto":
        smallest = min(len(each.images) for each in sets)
        axes = min(AXES, max(1, smallest // 4), found.train.images[0].numel())
        name = "features" if featured else f"pca:{axes}"
    if name == "features":
        if not featured:
            raise UsageError("--space features needs --extractor, or files of features")
        given = [each.features for each in sets if each.features is not None]
        return name, [each.to(study.device).double() for each in given]
    vectors = [each.vectors(study.device).double() for each in sets]
    if name == "pixels":
        return name, vectors
    kind, _, number = name.partition(":")
    if kind != "pca" or not number.isdecimal() or int(number) < 1:
        raise UsageError(f"--space {name} is none of auto, pixels, features, pca:K")
    # Of both references together: axes of one would favour it.
    project = principal_components(torch.cat(vectors[1:]), int(number))
    return name, [project(each) for each in vectors]


def _quality(found: Parts, study: Study) -> tuple[list[Figure], dict[str, Any]]:
    name, (x, *references) = _space(found, study)
    boot, memory = study.bootstrap, study.memory
    titles = ["--samples", "--train", "--heldout"]
    for each, title in zip((x, *references), titles, strict=False):
        if len(each) <= study.k:
            raise DataError(
                f"{title} has {len(each)} images, and quality with -k {study.k} needs more than "
                f"{study.k}: give more, or --no-quality"
            )
    normals = [
        gaussian(each, title, study.ridge)
        for each, title in zip((x, *references), titles, strict=False)
    ]
    figures = [Figure("fd", [frechet_distance(normals[0], each) for each in normals[1:]])]
    more: dict[str, Any] = {"space": name, "k": study.k}
    if len(references) > 1:
        more["fd_train_heldout"] = frechet_distance(normals[1], normals[2])
    inside = [manifolds(x, each, study.k, memory) for each in references]
    for place, title in enumerate(("precision", "recall", "density", "coverage")):
        figures.append(_mean(title, [each[place] for each in inside], boot))
    apart = discrepancy(
        x, references[0], references[1] if len(references) > 1 else None,
        boot.resamples, boot.seed, memory,
    )  # fmt: skip
    values = [apart.train, *([] if apart.heldout is None else [apart.heldout])]
    figures.append(Figure("mmd2", values))
    more["mmd_width"] = apart.width
    if apart.gap is not None:
        more["mmd2_gap"], more["mmd2_gap_p"] = apart.gap, apart.p
    return figures, more


def _mean(name: str, values: Sequence[Tensor], boot: Bootstrap) -> Figure:
    means = [float(each.double().mean()) for each in values]
    return Figure(name, means, [boot.interval(each) for each in values])


def _quantile(name: str, values: Sequence[Tensor], at: float, boot: Bootstrap) -> Figure:
    found = [float(each.quantile(at)) for each in values]
    return Figure(name, found, [boot.percentile(each, at) for each in values])


def _shape(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))
