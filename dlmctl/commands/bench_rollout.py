"""`dlmctl bench rollout`: options and wiring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlmctl.commands.options import BatchSize, Device, Dtype, Json, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.commands.sampling import (
    BlockLength,
    GenLength,
    Refresh,
    RefreshBelow,
    Steps,
    Temperature,
)
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record, read_records
from dlmctl.settings.sampler import Sampler

if TYPE_CHECKING:
    from dlmctl.models.policy import Policy


def command(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE",
            help="Prompts in JSONL files, - is standard input; none makes prompts of random ids.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="random:100m or random:8b, random weights in the shape of LLaDA; or any model.",
        ),
    ] = "random:100m",
    paths: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="What to measure: exact, compiled, threshold, factor, prefix, dual, "
            "prefix+threshold, dual+threshold, dual+factor.",
        ),
    ] = "exact,dual,dual+threshold,dual+factor",
    reference: Annotated[
        int, typer.Option(min=0, help="Prompts that LLaDA's plain sampler runs on, one at a time.")
    ] = 2,
    prompts: Annotated[
        int, typer.Option(min=1, help="Random prompts, where no FILE is given.")
    ] = 16,
    prompt_lengths: Annotated[
        str, typer.Option(metavar="FROM-TO", help="Their lengths, evenly spread.")
    ] = "64-256",
    gen_length: GenLength = None,
    block_length: BlockLength = None,
    steps: Steps = None,
    temperature: Temperature = 0.0,
    threshold: Annotated[float, typer.Option(help="Of the paths that name it.")] = 0.9,
    factor: Annotated[float, typer.Option(help="Of the paths that name it.")] = 1.0,
    refresh: Refresh = None,
    refresh_below: RefreshBelow = 0.0,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Samplers beside LLaDA's plain one: tokens per second, passes, tokens that differ.

    The plain sampler runs first, then each path on the same prompts. Writes for each: tokens per
    second; ratio to the first row; nfe, forward passes of a completion; same, the share of tokens
    that are the first row's; accuracy, where the records have a task; peak memory in megabytes.

    Examples:

    dlmctl bench rollout --gen-length 256 --steps 64

    dlmctl prompts sudoku --split test -n 512 | dlmctl bench rollout -m builtin:puzzles -
    """
    from dlmctl.bench.rollout import compare_samplers, ways
    from dlmctl.bench.shapes import bench_policy, random_prompts
    from dlmctl.diffusion.noise import stream_key
    from dlmctl.diffusion.sampling import Request, configured

    policy = bench_policy(model, device, dtype)
    settings = configured(policy, Sampler(gen_length, block_length, steps, temperature))
    known = ways(settings, threshold, factor, refresh, refresh_below)
    for name in paths.split(","):
        if name not in known:
            raise UsageError(f"--paths has no '{name}'; there are: {', '.join(known)}")
    chosen = {name: known[name] for name in paths.split(",")}
    judge = None
    if files:
        records = list(read_records(files, "fail"))
        if not records:
            raise UsageError("no prompts came in; nothing to measure on")
        ids = [policy.encode(record) for record in records]
        judge = _judge(records, policy)
    elif policy.tokenizer is None:
        shortest, longest = _lengths(prompt_lengths)
        ids = random_prompts(policy, prompts, shortest, longest)
    else:
        raise UsageError(f"{model} wants prompts: name a FILE, or - for standard input")
    requests = [Request(p, stream_key(seed, index)) for index, p in enumerate(ids)]
    rows = compare_samplers(policy, requests, settings, chosen, batch_size, reference, judge)
    rows = counted(rows, "rows", quiet, len(chosen) + bool(reference))
    names = ["path", "tokens_per_second", "ratio", "nfe", "same", "accuracy", "peak_memory_mb"]
    write_rows(rows, names if judge else [n for n in names if n != "accuracy"], json)


def _lengths(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    last = last or first
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UsageError(f"--prompt-lengths {text} is not FROM-TO, two numbers of tokens")
    return int(first), int(last)


def _judge(
    records: Sequence[Record], policy: Policy
) -> Callable[[Sequence[list[int]]], float] | None:
    """The share of completions that their task's verifier takes; None without a task."""
    from dlmctl.verifiers.registry import verify

    if any("task" not in record for record in records):
        return None

    def accuracy(completions: Sequence[list[int]]) -> float:
        answered: list[Any] = []
        for record, tokens in zip(records, completions, strict=True):
            done = Record(record)
            done.where = record.where
            done["completion"] = policy.decode(tokens)
            answered.append(done)
        rewards = [record["reward"] for record in verify(answered)]
        return sum(reward >= 1.0 for reward in rewards) / len(rewards)

    return accuracy
