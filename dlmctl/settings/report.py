"""What `plot` draws."""

from __future__ import annotations

from dataclasses import dataclass

from dlmctl.settings import knob

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
