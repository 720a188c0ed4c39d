"""How `verify` turns what verifiers say into rewards, and what verifiers may use."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from dlmctl.settings import knob
from dlmctl.settings.parsing import byte_count, named_number

LIMITS = "Limits"


@dataclass(frozen=True)
class Judging:
    """Weights of the verifiers, a program that judges, and limits on time, memory and access."""

    weight: list[str] | None = knob(
        None, "Weight of a verifier in 'reward' (default 1); repeatable.", metavar="NAME=WEIGHT"
    )
    preset: Literal["d1"] | None = knob(
        None,
        "d1: the shaped rewards of d1 for each task, with the bugs of its code fixed.",
        shown_default="none",
    )
    program: str | None = knob(
        None,
        "Your own program: it reads one record per line, and for each writes and flushes a line "
        'with a number, or with {"reward": number, ...}.',
        "--exec",
        metavar="COMMAND",
        shown_default="none",
    )
    time_limit: float = knob(
        10.0,
        "Seconds that a verifier may take for a record. One that takes longer gives 0; --exec "
        "fails.",
        minimum=0.1,
        panel=LIMITS,
    )
    memory_limit: str | None = knob(
        None,
        "Address space of each process of --exec and of code, as 512M or 4G.",
        metavar="SIZE",
        shown_default="none for --exec, 1G for code",
        panel=LIMITS,
    )
    allow_unconfined: bool = knob(
        False,
        "Run the code that the verifier code tests even if the kernel cannot deny it files, "
        "network and processes.",
        "--allow-unconfined",
        panel=LIMITS,
    )

    def __post_init__(self) -> None:
        self.weights, self.memory  # noqa: B018 (they raise)

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weights by the names of their verifiers."""
        return dict(named_number("--weight", text, "NAME=NUMBER") for text in self.weight or ())

    @cached_property
    def memory(self) -> int | None:
        """Bytes of `memory_limit`."""
        return byte_count("--memory-limit", self.memory_limit) if self.memory_limit else None
