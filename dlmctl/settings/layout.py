"""Names of the tags in a response that first says what it sees and then thinks."""

from __future__ import annotations

from dataclasses import dataclass

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob


@dataclass(frozen=True)
class Tags:
    """Names of the tags around the two parts."""

    perception: str = knob(
        "description",
        "Name of the tags around what a response says it sees.",
        "--perception-tag",
        metavar="TAG",
        env=True,
    )
    reasoning: str = knob(
        "think",
        "Name of the tags around what a response concludes from it.",
        "--reasoning-tag",
        metavar="TAG",
        env=True,
    )

    def __post_init__(self) -> None:
        for option, name in (
            ("--perception-tag", self.perception),
            ("--reasoning-tag", self.reasoning),
        ):
            if not name.replace("-", "_").isidentifier():
                raise UsageError(f"{option} {name} is not a name: give it without < and >")
        if self.perception == self.reasoning:
            raise UsageError(f"--perception-tag and --reasoning-tag are both {self.perception}")
