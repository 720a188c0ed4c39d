"""`dlmctl bench update`: options and wiring."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.options import Device, Dtype, Json, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.settings.parsing import whole_numbers


def command(
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="random:100m or random:8b, random weights in the shape of LLaDA; or any model.",
        ),
    ] = "random:100m",
    gen_length: Annotated[int, typer.Option(min=1, help="Tokens of a completion.")] = 512,
    prompt_length: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 128,
    completions: Annotated[
        int, typer.Option("-n", "--completions", min=2, help="Completions in the group.")
    ] = 2,
    samples: Annotated[
        int, typer.Option("-k", "--masks-per-sample", min=1, help="Masks for each completion.")
    ] = 4,
    lora_rank: Annotated[
        int, typer.Option(min=0, help="Train an adapter of this rank; 0 trains all weights.")
    ] = 0,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations in the backward pass, in both.",
        ),
    ] = False,
    batch_sizes: Annotated[
        str,
        typer.Option(
            "--batch-size",
            metavar="SIZES",
            help="Sequences in a pass of update, a row for each.",
        ),
    ] = "4,1",
    repeats: Annotated[int, typer.Option(min=1, help="Runs; the fastest counts.")] = 2,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """One RSPO gradient beside the plain implementation: seconds and peak memory.

    The work is that of a step of 'dlmctl update' up to the optimizer: scores under policy and
    reference, then the gradient. The plain one makes the logits of every position. Writes for each:
    seconds; ratio to the first row; peak memory in megabytes, on top of the weights, and its ratio;
    difference of the gradients, relative to their norm.

    Examples:

    dlmctl bench update --gen-length 512 -k 4

    dlmctl bench update -m random:8b --lora-rank 128 -n 6
    """
    from dlmctl.bench.shapes import bench_policy
    from dlmctl.bench.update import compare_gradients
    from dlmctl.train.activations import checkpoint_activations
    from dlmctl.train.lora import Adapter, add_adapter

    policy = bench_policy(model, device, dtype)
    other = None
    if lora_rank:
        policy = add_adapter(policy, Adapter(lora_rank))
    else:
        other = bench_policy(model, device, dtype)
    if gradient_checkpointing:
        checkpoint_activations(policy.core)
    sizes = whole_numbers("--batch-size", batch_sizes)
    rows = compare_gradients(
        policy,
        other,
        prompt_length,
        gen_length,
        completions,
        samples,
        sizes,
        repeats,
        seed,
    )
    names = [
        "path",
        "batch_size",
        "seconds",
        "ratio",
        "peak_memory_mb",
        "memory_ratio",
        "difference",
    ]
    write_rows(counted(rows, "rows", quiet, 1 + len(sizes)), names, json)
