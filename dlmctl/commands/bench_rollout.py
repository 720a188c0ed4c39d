"""`dlmctl bench rollout`: options and wiring."""

from __future__ import annotations

from typing import Annotated

from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import read_records
from dlmctl.settings import Knob
from dlmctl.settings.bench import BenchModel, SamplerPaths
from dlmctl.settings.compute import Compute, Seed
from dlmctl.settings.streams import Json, Quiet

COLUMNS = ["path", "tokens_per_second", "ratio", "nfe", "same", "accuracy", "peak_memory_mb"]


def command(
    files: Annotated[
        list[str] | None,
        Knob(
            "Prompts in JSONL files; - is standard input. Without a FILE, prompts of random ids.",
            metavar="FILE",
            argument=True,
        ),
    ] = None,
    model: BenchModel = "random:100m",
    paths: SamplerPaths = SamplerPaths(),
    seed: Seed = 0,
    compute: Compute = Compute(batch_size=64),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Compare samplers with LLaDA's plain one: tokens per second, passes, tokens that differ.

    The plain sampler runs first, then each path on the same prompts, all with the same noise.
    Temperature and lengths are by default those of 'dlmctl rollout'. Writes for each: tokens per
    second; ratio to the first row; nfe, forward passes of a completion; same, the share of tokens
    that equal the first row's; accuracy, if the records have a task; peak memory in megabytes.

    Examples:

    dlmctl bench rollout --gen-length 256 --steps 64

    dlmctl prompts sudoku --split test -n 512 | dlmctl bench rollout -m builtin:puzzles -
    """
    from dlmctl.bench.rollout import accuracy_of, compare_samplers, sampler_paths, usual_paths
    from dlmctl.bench.shapes import bench_policy, random_prompts
    from dlmctl.diffusion.noise import stream_key
    from dlmctl.diffusion.sampling import Request

    policy = bench_policy(model, compute.device, compute.dtype)
    known = sampler_paths(policy, paths)
    names = (paths.paths or usual_paths(policy)).split(",")
    for name in names:
        if name not in known:
            raise UsageError(f"--paths has no '{name}'; there are: {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    accuracy = None
    if files:
        records = list(read_records(files, "fail"))
        if not records:
            raise UsageError("no prompts came in; nothing to measure on")
        ids = [policy.encode(record) for record in records]
        if all("task" in record for record in records):
            accuracy = accuracy_of(records, policy)
    elif policy.tokenizer is None:
        ids = random_prompts(policy, paths.prompts, *paths.lengths)
    else:
        raise UsageError(f"{model} wants prompts: name a FILE, or - for standard input")
    requests = [Request(prompt, stream_key(seed, index)) for index, prompt in enumerate(ids)]
    rows = compare_samplers(
        policy, requests, known["exact"], chosen, compute.batch_size, paths.reference, accuracy
    )
    rows = counted(rows, "rows", quiet, len(chosen) + bool(paths.reference))
    write_rows(rows, [name for name in COLUMNS if accuracy or name != "accuracy"], json)
