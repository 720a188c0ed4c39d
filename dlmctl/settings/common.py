"""What most subcommands have: input, output, errors, seeds, devices."""

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
Seed = Annotated[int, Knob("Same seed, same input: same output.", "--seed", env=True)]
Json = Annotated[bool, Knob("Write JSON on a terminal too, as in a pipe.", "--json")]
Model = Annotated[
    str,
    Knob(
        "Hub name, directory or checkpoint; builtin:puzzles is the model that dlmctl ships.",
        "-m",
        "--model",
        metavar="MODEL",
        env=True,
    ),
]
DeviceName = Annotated[
    str, Knob("auto, cpu, cuda or cuda:N.", "--device", metavar="DEVICE", env=True)
]
Memory = Annotated[
    str,
    Knob(
        "Memory for blocks of distances, as 512M or 4G; changes speed, not results.",
        "--memory",
        metavar="SIZE",
        env=True,
    ),
]


def kept_in(output: object, on_error: OnError) -> OnError:
    """What happens to faulty records: without an output that could keep them they are left out."""
    return on_error if output or on_error == "fail" else "skip"


@dataclass(frozen=True)
class Device:
    """Where a model runs."""

    device: str = same("auto", DeviceName)
    dtype: str = knob(
        "auto",
        "auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.",
        metavar="DTYPE",
        env=True,
    )


@dataclass(frozen=True)
class Compute(Device):
    """Where a model runs, and on how much at a time."""

    batch_size: int = knob(
        32,
        "Sequences per forward pass; changes speed and memory, not results.",
        "-b",
        "--batch-size",
        minimum=1,
        env=True,
    )


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
