"""Names of the tags around the two parts of a response that describes what it sees."""

from __future__ import annotations

from dataclasses import dataclass

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob


@dataclass(frozen=True)
class Tags:
    """The tags of Vision-SR1 (arXiv 2508.19652), or others."""

    perception: str = knob(
        "description",
        "Name of the tags around what a response says that it sees.",
        "--perception-tag",
        metavar="TAG",
        env=True,
    )
    reasoning: str = knob(
        "think",
        "Name of the tags around the reasoning of a response.",
        "--reasoning-tag",
        metavar="TAG",
        env=True,
    )

    def __post_init__(self) -> None:
        names = (("--perception-tag", self.perception), ("--reasoning-tag", self.reasoning))
        for option, name in names:
            if not name.replace("-", "_").isidentifier():
                raise UsageError(f"{option} {name} is not a name: give it without < and >")
        if self.perception == self.reasoning:
            raise UsageError(f"--perception-tag and --reasoning-tag are both {self.perception}")


TAGS = Tags()
