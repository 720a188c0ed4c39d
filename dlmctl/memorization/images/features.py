"""Features of the sets of a study: by the networks that it names, or read from files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlmctl.distill.image_sets import read_images
from dlmctl.memorization.images.compared_sets import ImageSet, ImageSets, with_features
from dlmctl.memorization.images.image_encoder import ImageEncoder
from dlmctl.memorization.images.inception import InceptionEncoder, notes_on_fid
from dlmctl.memorization.images.lpips import Lpips
from dlmctl.memorization.images.sscd import SscdEncoder
from dlmctl.records.errors import DataError, UsageError
from dlmctl.settings.memorization import Encoders


class SetFeatures:
    """Adds features to sets of samples; those of the reference sets are computed once."""

    def __init__(self, encoders: Encoders, device: torch.device, heldout: bool) -> None:
        """Load the networks.

        Args:
            heldout: whether there is a held-out set.

        Raises:
            UsageError: files of features are not as many as sets.
            MissingInputError, DataError, UnavailableError: as the encoders.
        """
        networks: dict[str, Any] = {}
        if encoders.sscd:
            networks["sscd"] = SscdEncoder(encoders.sscd, device)
        if encoders.inception:
            networks["inception"] = InceptionEncoder(
                encoders.inception, encoders.inception_resize, device
            )
        if encoders.extractor:
            networks["features"] = ImageEncoder(encoders.extractor, device)
        self._encode: dict[str, Callable[[str, ImageSet], Tensor]] = {
            name: _by(network) for name, network in networks.items()
        }
        if encoders.features:
            self._encode["features"] = _from_files(encoders.features.split(","), heldout)
        self._references: dict[tuple[str, str], Tensor] = {}
        self.about: dict[str, Any] = {}
        """Fields of a record: the weights by path and hash."""
        for network in networks.values():
            self.about |= network.about
        self.lpips: Lpips | None = None
        """A distance of two images, which has no features to keep."""
        if encoders.lpips and encoders.lpips_heads:
            self.lpips = Lpips(encoders.lpips, encoders.lpips_heads, device)
            self.about |= self.lpips.about

    def added(self, sets: ImageSets) -> ImageSets:
        """The sets with features.

        The reference sets are the same in each call.

        Raises:
            UsageError, DataError: as the encoders; or a file has features of another set.
        """
        for name in self._encode:
            sets = with_features(sets, name, functools.partial(self._features, name))
        if "inception" not in self._encode:
            return sets
        parts = (sets.samples, sets.train, sets.unseen)
        least = min(len(part.images) for part in parts if part)
        return sets._replace(notes=[*sets.notes, *notes_on_fid(least)])

    def _features(self, name: str, title: str, part: ImageSet) -> Tensor:
        """float32 [N, F]: the features `name` of the set `title`."""
        if title == "samples":
            return self._encode[name](title, part)
        if (name, title) not in self._references:
            self._references[name, title] = self._encode[name](title, part)
        return self._references[name, title]


def _by(network: Callable[[Tensor], Tensor]) -> Callable[[str, ImageSet], Tensor]:
    return lambda _, part: network(part.images)


def _from_files(files: list[str], heldout: bool) -> Callable[[str, ImageSet], Tensor]:
    """A function from a set's name and the set to its rows of a file."""
    names = ["samples", "train", *(["heldout"] if heldout else [])]
    if len(files) != len(names):
        raise UsageError(f"--features takes {len(names)} files here: {','.join(names).upper()}")
    sources = dict(zip(names, files, strict=True))

    def read(name: str, part: ImageSet) -> Tensor:
        rows = read_images(sources[name])
        if rows.dim() != 2 or len(rows) != part.read:
            raise DataError(
                f"{sources[name]} is {list(rows.shape)}: of --{name} there have to be features "
                f"[{part.read}, F]"
            )
        return rows[part.places]

    return read
