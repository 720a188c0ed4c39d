"""Options of `dlmctl memo-eval prompts`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, same
from dlmctl.settings.compute import Seed
from dlmctl.settings.memorization import COPIES

Measure = Literal["norm", "clique", "clip"]


@dataclass(frozen=True)
class Replication:
    """What is measured of a text-to-image model's samples of a prompt."""

    PANEL: ClassVar[str] = COPIES

    measure: str | None = knob(
        None,
        "norm (Wen et al. 2024), clique (Carlini et al. 2023), clip; several separated by commas.",
        metavar="MEASURES",
        shown_default="norm,clique; with --clip clip too",
    )
    count: int | None = knob(
        None,
        "Samples for each prompt.",
        "-n",
        "--samples",
        minimum=1,
        shown_default="500 with clique, as its paper; else 4, as Wen et al.'s code",
    )
    steps: int | None = knob(
        None,
        "Sampling steps: of DDIM for a teacher.",
        minimum=1,
        shown_default="50 for a teacher, as Wen et al.'s code; 4 for a student (ours)",
    )
    guidance: float = knob(
        7.5, "Guidance scale, as diffusers counts it; 1 is none. 7.5 is Wen et al.'s.", minimum=1.0
    )
    norm_steps: int | None = knob(
        None,
        "For norm: average over the first N steps; without clique and clip the sampler ends "
        "after them. The paper finds the first step nearly enough.",
        minimum=1,
        shown_default="all",
    )
    tiles: int = knob(
        4,
        "For clique: tiles along each side of an image; 4, for 16 tiles of 128 pixels, is the "
        "paper's.",
        minimum=1,
    )
    tile_distance: float = knob(
        0.15,
        "For clique: two samples are near duplicates if no two tiles are farther apart, by the "
        "root of the mean square of pixels in [0, 1]. 0.15 is the paper's limit for a copy of a "
        "training image; to take it for near duplicates is ours.",
        minimum=0.0,
    )
    clique_size: int = knob(
        10,
        "For clique: a prompt is replicated if this many samples are near duplicates of each "
        "other; the paper has 10 of 500.",
        minimum=2,
    )
    clip: Path | None = knob(
        None,
        "CLIPModel of transformers, with its tokenizer, for clip: a directory with config.json and "
        "safetensors.",
        metavar="DIRECTORY",
        shown_default="none",
    )
    batch_size: int = knob(
        8,
        "Samples per batch; changes speed and memory, not results.",
        "-b",
        "--batch-size",
        minimum=1,
        env=True,
    )
    seed: int = same(0, Seed)

    def __post_init__(self) -> None:
        measures = self.measures
        if ("clip" in measures) != bool(self.clip):
            raise UsageError("--measure clip and --clip DIRECTORY need each other")
        if "clique" in measures and self.samples < self.clique_size:
            raise UsageError(
                f"-n {self.samples} samples have no clique of --clique-size {self.clique_size}: "
                "take more, or --measure norm"
            )

    @cached_property
    def measures(self) -> list[Measure]:
        """The measures, in the order in which they were asked for."""
        default = "norm,clique,clip" if self.clip else "norm,clique"
        measures: list[Any] = (self.measure or default).split(",")
        for name in measures:
            if name not in get_args(Measure):
                raise UsageError(f"--measure {name} is not one of {', '.join(get_args(Measure))}")
        return measures

    @property
    def images(self) -> bool:
        """Whether samples are needed, not only the beginning of their way."""
        return self.measures != ["norm"]

    @property
    def samples(self) -> int:
        """Samples of a prompt."""
        return self.count or (500 if "clique" in self.measures else 4)

    def steps_of(self, student: bool) -> int:
        """Sampling steps.

        Raises:
            UsageError: the norm is to be averaged over more.
        """
        steps = self.steps or (4 if student else 50)
        if (self.norm_steps or 0) > steps:
            raise UsageError(f"--norm-steps {self.norm_steps} is more than the {steps} of --steps")
        return steps
