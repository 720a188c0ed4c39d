"""A reader that is to stand any input."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """What reads, and what it is given.

    Raises nothing but errors that are meant for users: anything else is a finding.
    """

    name: str
    seeds: list[bytes] | Callable[[], list[bytes]]
    """Sound inputs, from which others are made."""
    run: Callable[[bytes, Path], None]
    """Reads the input; the folder is empty, and the only one that may be written to."""
    mutate: Callable[[bytes, random.Random], bytes]
    share: float
    """Of the inputs, by the shares of others."""
    starts: bool = False
    """It may start processes."""
    imports: bool = False
    """It may load modules."""
    wall: float = 1.0
    """Seconds that it may take."""

    def beginnings(self) -> list[bytes]:
        """Its sound inputs."""
        return self.seeds() if callable(self.seeds) else list(self.seeds)
