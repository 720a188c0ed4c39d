"""Records in and out: files, shards, errors, progress, resuming."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dlmctl.records.jsonl import OnError
from dlmctl.settings import Knob, knob, same

Files = Annotated[
    list[str] | None,
    Knob(
        "JSONL files; none, or -, is standard input.",
        metavar="FILE",
        argument=True,
        shown_default=False,
    ),
]


Output = Annotated[
    str, Knob("Where the records go; - is standard output.", "-o", "--output", metavar="FILE")
]


Quiet = Annotated[
    bool,
    Knob(
        "No progress on stderr: neither the line on a terminal nor the line a minute in a log.",
        "-q",
        "--quiet",
        env=True,
    ),
]


OnErrorOption = Annotated[
    OnError,
    Knob(
        "What happens to a record that cannot be used: fail ends the stage (exit 65), skip leaves "
        "the record out, keep passes it on with an error field.",
        "--on-error",
        env=True,
    ),
]


Shard = Annotated[
    str | None,
    Knob(
        "Work on the I-th of N parts of the input, 1/N to N/N, so that N processes on as many "
        "machines share it. A part is contiguous and its groups are whole: the outputs, one after "
        "another, are the output of a single run.",
        "--shard",
        metavar="I/N",
        shown_default="the whole input",
    ),
]


Json = Annotated[bool, Knob("Write JSON on a terminal too, as in a pipe.", "--json")]


def kept_in(output: object, on_error: OnError) -> OnError:
    """What happens to faulty records: without an output that could keep them they are left out."""
    return on_error if output or on_error == "fail" else "skip"


@dataclass(frozen=True)
class Passes:
    """How often and in which order records are read."""

    epochs: int = knob(
        1,
        "How often the files are read; with a window of --shuffle in another order each time.",
        minimum=1,
    )
    shuffle: int = knob(
        1,
        "Mix the records, with this many in memory at a time; if all fit, every order is equally "
        "likely. 1 keeps the order.",
        metavar="WINDOW",
        minimum=1,
    )

    def recorded(self) -> dict[str, int]:
        """What a model's card says of it: nothing of one pass in order."""
        return {} if self == Passes() else {"epochs": self.epochs, "shuffle": self.shuffle}


@dataclass(frozen=True)
class Stage:
    """What every stage has that writes a record for a record."""

    shard: str | None = same(None, Shard)
    on_error: OnError = same("fail", OnErrorOption)
    quiet: bool = same(False, Quiet)
    output: str = same("-", Output)
    resume: bool = knob(
        False,
        "Resume from FILE.partial, which the same command left when it was stopped; what is done "
        "is not done again. If -o FILE exists, do nothing.",
        "--resume",
    )
