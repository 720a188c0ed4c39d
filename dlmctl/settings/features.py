"""Which windows of text are kept of each feature of an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob

WINDOWS = "Windows"

Neuronpedia = Annotated[
    Path | None,
    Knob(
        "Also write the features as an export that Neuronpedia imports. The last two names of the "
        "path are those that it shows: the model's, and layer and set, such as "
        "llada-8b/26-mask-res-16k.",
        metavar="…/MODEL/LAYER-SET",
    ),
]


@dataclass(frozen=True)
class WindowCounts:
    """How many windows of each kind are kept of a feature, and how wide they are."""

    PANEL: ClassVar[str] = WINDOWS

    top: int = knob(12, "Windows around the strongest activations.", minimum=1)
    weighted: int = knob(7, "Windows drawn in proportion to the activation.", minimum=0)
    inactive: int = knob(10, "Random windows in which the feature is not active.", minimum=0)
    radius: int = knob(10, "Tokens of a window on either side of its middle token.", minimum=0)

    def __post_init__(self) -> None:
        if self.top < 1 or min(self.weighted, self.inactive, self.radius) < 0:
            raise UsageError("at least one top window is kept, and no number of them is below 0")
