"""A picture of samples next to their nearest images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.memorization.images.compared_sets import ImageSet, ImageSets
from dlmctl.memorization.images.nearest_ratio import ratios
from dlmctl.memorization.images.sample_study import StudyResult
from dlmctl.records.errors import UsageError, missing_package
from dlmctl.settings.memorization import Gallery

COPY, TEXT, PALE, FRAME = "#c0392b", "#222222", "#666666", "#bbbbbb"
CELL, ACROSS, DOWN = 0.92, 1.0, 1.2
"""Inches: size of an image, distance to the next one, and distance of two rows."""
MARGIN, GAP, HEAD = 0.3, 0.35, 0.8
"""Inches: at the sides, between two columns of rows, and at the top."""
SMALL = 6.5


class GalleryRow(NamedTuple):
    """A sample and its neighbours."""

    sample: int
    ratio: float
    memorized: bool
    neighbours: list[tuple[ImageSet, int, float]]
    """Set, place in the set, and distance, of each image next to the sample."""


def picture(sets: ImageSets, result: StudyResult, threshold: float, options: Gallery) -> bytes:
    """PNG of samples next to their two nearest training images and the nearest held-out one.

    Args:
        threshold: of the ratio test.

    Raises:
        UsageError, UnavailableError: as `check_drawable`.
    """
    check_drawable(sets.samples.images)
    tests = ratios(result.neighbours[0])
    rows = []
    for sample in chosen(tests, options.gallery_rows, options.gallery_spread):
        neighbours = [
            (part, int(place), float(far))
            for part, near, most in zip(
                sets.references.values(), result.neighbours, (2, 1), strict=False
            )
            for place, far in zip(near.indices[sample, :most], near.distances[sample], strict=False)
        ]
        ratio = float(tests[sample])
        rows.append(GalleryRow(sample, ratio, ratio < threshold, neighbours))
    headings = ["sample", "nearest in train", "second nearest"]
    headings += ["nearest held out"] if sets.heldout else []
    copies = int((tests < threshold).sum())
    even = options.gallery_spread
    which = "at even steps of the ratio" if even else "with the lowest ratios"
    if len(rows) == len(tests):
        which = "by ratio"
    title = (
        f"{len(rows)} of {len(tests)} samples, {which}: "
        f"{copies} memorized, d1 / d2 < {threshold:.2f} (red)"
    )
    return _draw(rows, sets.samples, headings, title)


def check_drawable(images: Tensor) -> None:
    """Raise UsageError unless images have 1 or 3 channels, UnavailableError without matplotlib."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UsageError("--gallery draws images of 1 or 3 channels, and these are others")
    if find_spec("matplotlib") is None:
        raise missing_package("matplotlib", "plot", "--gallery")


def chosen(tests: Tensor, count: int, spread: bool) -> list[int]:
    """Samples to show, by ratio: those with the lowest, or at even steps through all."""
    order = tests.argsort(stable=True)
    if not spread or len(order) <= count:
        return order[:count].tolist()
    return order[torch.linspace(0, len(order) - 1, count).round().long()].tolist()


def _draw(rows: Sequence[GalleryRow], samples: ImageSet, headings: list[str], title: str) -> bytes:
    """The rows, in a number of columns that makes the picture about as wide as high."""
    from matplotlib.figure import Figure

    wide = ACROSS * len(headings) + GAP
    columns = max(1, min(len(rows), round(math.sqrt(len(rows) * DOWN / wide))))
    lines = math.ceil(len(rows) / columns)
    columns = math.ceil(len(rows) / lines)
    width = max(columns * wide - GAP + 2 * MARGIN, 0.065 * len(title))
    height = lines * DOWN + HEAD + 0.1
    beside = (width - columns * wide + GAP) / 2
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    _write(figure, width / 2, height - 0.25, title, 8.5, TEXT)
    for number, row in enumerate(rows):
        column, line = divmod(number, lines)
        left, top = beside + column * wide, height - HEAD - line * DOWN
        for place, heading in enumerate(headings if not line else []):
            _write(figure, left + place * ACROSS + ACROSS / 2, top + 0.1, heading, SMALL, PALE)
        _row(figure, row, samples, left, top)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _row(figure: Any, row: GalleryRow, samples: ImageSet, left: float, top: float) -> None:
    images = [(samples, row.sample, f"#{row.sample}   ratio {row.ratio:.2f}")]
    images += [
        (part, place, f"#{int(part.places[place])}   d {far:#.3g}")
        for part, place, far in row.neighbours
    ]
    width, height = figure.get_size_inches()
    for number, (part, place, text) in enumerate(images):
        middle = left + number * ACROSS + ACROSS / 2
        axes = figure.add_axes(
            ((middle - CELL / 2) / width, (top - CELL) / height, CELL / width, CELL / height)
        )
        image = ((part.images[place] + 1) / 2).clamp(0, 1).cpu().permute(1, 2, 0)
        pixels = image[:, :, 0] if image.shape[2] == 1 else image
        axes.imshow(pixels.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        marked = row.memorized and number < 2
        for spine in axes.spines.values():
            spine.set(color=COPY if marked else FRAME, linewidth=1.5 if marked else 0.5)
        colour = COPY if row.memorized and not number else TEXT
        _write(figure, middle, top - CELL - 0.11, text, SMALL, colour)


def _write(figure: Any, x: float, y: float, text: str, size: float, colour: str) -> None:
    """Text centred at a place in inches."""
    width, height = figure.get_size_inches()
    place = {"ha": "center", "va": "center"}
    figure.text(x / width, y / height, text, fontsize=size, color=colour, **place)
