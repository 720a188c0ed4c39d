"""Scenes as images: filled shapes on white, one per cell, with smooth edges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from dlmctl.records.errors import missing_package
from dlmctl.tasks.scenes import COLUMNS, ROWS, Thing

if TYPE_CHECKING:
    from PIL.Image import Image

PAINTS = {
    "red": (214, 39, 40),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 195, 20),
}
RADII = (0.3, 0.42)
"""Smallest and largest radius of a thing, relative to the side of a cell."""
FINER = 4
"""Images are drawn this many times larger, then averaged."""


class Look(NamedTuple):
    """What differs between two images of one scene; each number is from 0 to 1."""

    size: float
    x: float
    """Position within the room that its size leaves in the cell."""
    y: float


def draw_scene(scene: Sequence[Thing], looks: Sequence[Look], cell: int) -> Image:
    """An RGB image of three by three cells of `cell` x `cell` pixels.

    Raises:
        UnavailableError: Pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise missing_package("pillow", "vision", "drawing scenes") from None
    side = cell * FINER
    image = Image.new("RGB", (side * len(COLUMNS), side * len(ROWS)), "white")
    pen = ImageDraw.Draw(image)
    for thing, look in zip(scene, looks, strict=True):
        radius = side * (RADII[0] + look.size * (RADII[1] - RADII[0]))
        room = side - 2 * radius
        left = side * COLUMNS.index(thing.column) + radius + look.x * room
        top = side * ROWS.index(thing.row) + radius + look.y * room
        _draw(pen, thing, left, top, radius)
    return image.reduce(FINER)


def _draw(pen: Any, thing: Thing, x: float, y: float, radius: float) -> None:
    """Fill a shape around (x, y) that reaches no further than `radius`."""
    paint = PAINTS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=paint)
        return
    corners = {
        "square": [(radius, 45 + 90 * n) for n in range(4)],
        "triangle": [(radius, 120 * n) for n in range(3)],
        "star": [(radius * (0.4 if n % 2 else 1.0), 36 * n) for n in range(10)],
    }[thing.shape]
    pen.polygon(
        [
            (x + r * math.sin(math.radians(turn)), y - r * math.cos(math.radians(turn)))
            for r, turn in corners
        ],
        fill=paint,
    )
