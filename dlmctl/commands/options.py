"""Options that several subcommands share: one name, one help text, one environment variable."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.records.jsonl import OnError
from dlmctl.settings.layout import Tags

Files = Annotated[
    list[str] | None,
    typer.Argument(metavar="FILE", help="JSONL files; none, or -, is standard input."),
]
Output = Annotated[
    str,
    typer.Option("-o", "--output", metavar="FILE", help="Where records go; - is standard output."),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on with FILE.partial, which the same command left when it was stopped: what is "
        "done is not done again. Where -o FILE is there, do nothing.",
    ),
]
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        show_default="the whole input",
        help="Work on the I-th of N parts of the input, 1/N to N/N, as N processes on as many "
        "machines do. Parts are contiguous, groups whole: the outputs of all, one after another, "
        "are that of a single run.",
    ),
]
OnErrorOption = Annotated[
    OnError,
    typer.Option(
        "--on-error",
        envvar="DLMCTL_ON_ERROR",
        help="A record that cannot be used: fail ends the stage (exit 65), skip leaves it out, "
        "keep passes it on with an error field.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        "-m",
        "--model",
        metavar="MODEL",
        envvar="DLMCTL_MODEL",
        help="Hub name, directory or checkpoint; builtin:puzzles is the model that comes along.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", envvar="DLMCTL_SEED", help="Same seed, same input: same output.")
]
Device = Annotated[
    str,
    typer.Option(
        "--device", metavar="DEVICE", envvar="DLMCTL_DEVICE", help="auto, cpu, cuda or cuda:N."
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        envvar="DLMCTL_DTYPE",
        help="auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16 or float16.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "-b",
        "--batch-size",
        min=1,
        envvar="DLMCTL_BATCH_SIZE",
        help="Sequences per forward pass; changes speed and memory, not results.",
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        "--memory",
        metavar="SIZE",
        envvar="DLMCTL_MEMORY",
        help="Memory for blocks of distances, as 512M or 4G; changes speed, not results.",
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "-q",
        "--quiet",
        envvar="DLMCTL_QUIET",
        help="No progress on stderr: neither the line on a terminal nor, in a log, one a minute.",
    ),
]
MaskBlock = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="the model's own, else 32",
        help="Length of a block, for --masks block.",
    ),
]
PerceptionTag = Annotated[
    str,
    typer.Option(
        metavar="TAG",
        envvar="DLMCTL_PERCEPTION_TAG",
        help="Name of the tags around what a response says it sees.",
    ),
]
ReasoningTag = Annotated[
    str,
    typer.Option(
        metavar="TAG",
        envvar="DLMCTL_REASONING_TAG",
        help="Name of the tags around what a response makes of it.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="JSON on a terminal too, as in a pipe.")]


def tag_names(perception: str, reasoning: str) -> Tags:
    """The names of both tags."""
    return Tags(perception, reasoning)


def kept_in(output: object, on_error: OnError) -> OnError:
    """What becomes of faulty records: those that no output can keep are left out, and named."""
    return on_error if output or on_error == "fail" else "skip"
