"""The sets of a study: samples, training set and held-out set, checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.images.nearest_ratio import distinct, shared
from dlmctl.records.errors import DataError
from dlmctl.settings.memorization import SampleStudy


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
    features: Mapping[str, Tensor] = MappingProxyType({})
    """float32 [N, F] each, by the name of what they are of: features, inception, sscd."""

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
    features = {name: each[:count] for name, each in images.features.items()}
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


def with_features(
    sets: ImageSets, name: str, features: Callable[[str, ImageSet], Tensor]
) -> ImageSets:
    """The sets with the features that a function returns for each, given its name.

    Args:
        name: of the features.
    """

    def encoded(title: str, part: ImageSet) -> ImageSet:
        return part._replace(features={**part.features, name: features(title, part)})

    samples, train = encoded("samples", sets.samples), encoded("train", sets.train)
    if sets.unseen is None:
        return sets._replace(samples=samples, train=train)
    unseen = encoded("heldout", sets.unseen)
    heldout = _first(unseen, len(train.images))
    return sets._replace(samples=samples, train=train, heldout=heldout, unseen=unseen)


def _shape(images: Tensor) -> str:
    return " x ".join(map(str, images.shape[1:]))
