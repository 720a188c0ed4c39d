"""How sampling is steered by features of sparse autoencoders."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob

Scope = Literal["all", "update", "topk"]

STEERING = "Steering"


class SteeredFeature(NamedTuple):
    """A feature and how far to go in its direction."""

    sae: str
    """Folder of the autoencoder."""
    layer: int | None
    """Block whose output is changed, counted from 0; None: the one that the folder names."""
    feature: int
    amplitude: float


@dataclass(frozen=True)
class Steering:
    """Which features are steered, at which positions and when; none by default.

    Raises:
        UsageError: an option is malformed, or says how to steer while nothing is steered.
    """

    steer: list[str] | None = knob(
        None,
        "Add the direction of a feature to the residual stream in every pass, multiplied by "
        "AMPLITUDE and by the largest activation at the position. SAE is a folder from any of the "
        "libraries that sae-convert reads, LAYER the block (counted from 0) if the folder does "
        "not name it; repeatable.",
        metavar="SAE[@LAYER]:FEATURE=AMPLITUDE",
        shown_default="off",
        panel=STEERING,
    )
    steer_scope: Scope | None = knob(
        None,
        "Steer all positions of a pass (all), those still masked (update; for an autoregressive "
        "model the newest), or the three in each row at which the pre-activation of the feature "
        "is largest (topk).",
        shown_default="all",
        panel=STEERING,
    )
    steer_time: str | None = knob(
        None,
        "Steer only while the share of the completion that is masked is above LO and at most HI: "
        "0.5-1 is the first half of the tokens.",
        metavar="LO-HI",
        shown_default="always",
        panel=STEERING,
    )

    def __post_init__(self) -> None:
        self.features, self.time  # noqa: B018 (they raise)
        if not self.steer and (self.steer_scope or self.steer_time):
            raise UsageError("--steer-scope and --steer-time say how to steer: give --steer too")

    @cached_property
    def features(self) -> list[SteeredFeature]:
        """What `steer` says, parsed."""
        return [_feature(text) for text in self.steer or ()]

    @property
    def scope(self) -> Scope:
        """`steer_scope` or its default."""
        return self.steer_scope or "all"

    @cached_property
    def time(self) -> tuple[float, float] | None:
        """`steer_time`, parsed: steer while LO < masked share <= HI, so that adjoining ranges have
        no step in common; None is always."""
        if not self.steer_time:
            return None
        low_text, _, high_text = self.steer_time.partition("-")
        try:
            low, high = float(low_text), float(high_text)
        except ValueError:
            raise UsageError(f"--steer-time {self.steer_time} is not LO-HI, as 0.5-1") from None
        if not 0 <= low < high <= 1:
            raise UsageError("--steer-time is LO-HI with 0 <= LO < HI <= 1")
        return low, high


def _feature(text: str) -> SteeredFeature:
    """Parse `SAE[@LAYER]:FEATURE=AMPLITUDE`; raises UsageError."""
    match = re.fullmatch(r"(.+?)(?:@(\d+))?:(\d+)=([^=]+)", text)
    try:
        if match is None:
            raise ValueError
        sae, layer, feature, amplitude = match.groups()
        return SteeredFeature(
            sae, None if layer is None else int(layer), int(feature), float(amplitude)
        )
    except ValueError:
        raise UsageError(f"--steer {text} is not SAE[@LAYER]:FEATURE=AMPLITUDE") from None
