"""What `plot` draws, and what `stats` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlmctl.settings import knob, same
from dlmctl.settings.compute import Seed

DEFAULT_YS = ("reward", "kl", "grad_norm")


@dataclass(frozen=True)
class Curves:
    """Measures, what they are drawn over, and how."""

    y: list[str] | None = knob(
        None,
        "What is drawn, one panel each: a field of the records, or, with dots, a field within a "
        "field, as rollout.order; repeatable.",
        "-y",
        metavar="MEASURE",
        shown_default=", ".join(DEFAULT_YS),
    )
    x: str = knob("step", "What it is drawn over.", "-x", metavar="FIELD")
    by: str = knob(
        "run", "One line per value of this field, or of a list of fields.", metavar="FIELD"
    )
    smooth: int = knob(
        1, "Draw the mean over this many points, with the points faint behind it.", minimum=1
    )
    log_x: bool = knob(False, "Logarithmic axis for -x; 0 is left out.", "--log-x")
    log_y: bool = knob(False, "Logarithmic axes for the measures; 0 is left out.", "--log-y")
    title: str = knob("", "Title of the picture.")

    @property
    def measures(self) -> list[str]:
        """The names of what is drawn."""
        return self.y or list(DEFAULT_YS)


@dataclass(frozen=True)
class Comparing:
    """What `stats` compares the records with, and when it fails."""

    PANEL: ClassVar[str] = "Comparison with a baseline"

    compare: str | None = knob(
        None,
        "Compare with the verified records of this file, prompt by prompt (task, id and sample): a "
        "row for each measure, with the difference, its interval, and p. What has no counterpart "
        "is left out, and named on stderr.",
        metavar="BASELINE",
        shown_default="off",
    )
    fail_worse: list[str] | None = knob(
        None,
        "With --compare, exit 1 if this measure over all pairs is significantly worse: the "
        "interval of the difference does not contain 0, and p is at most 1 - CONFIDENCE. Worse is "
        "less; of nfe and tokens, more. Repeatable.",
        metavar="MEASURE",
        shown_default="never",
    )
    bootstrap: int = knob(
        10_000, "Resamples of the prompts for intervals, and exchanges for p.", minimum=100
    )
    seed: int = same(0, Seed)
