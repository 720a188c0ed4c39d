"""`dlmctl bench sae`: options and wiring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.corpora import layer_numbers, position_kinds
from dlmctl.commands.options import Device, Dtype, Json, Quiet, Seed
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.settings.parsing import whole_numbers

MEASURES = ("steps", "pipeline")
STEPS_COLUMNS = [
    "measure",
    "path",
    "k",
    "tokens_per_second",
    "ratio",
    "loss",
    "peak_memory_mb",
    "memory_ratio",
]
PIPELINE_COLUMNS = [
    "measure",
    "path",
    "passes",
    "seconds",
    "ratio",
    "model_seconds",
    "model_ratio",
    "sae_seconds",
    "difference",
]


def command(
    activations: Annotated[
        Path | None,
        typer.Argument(
            metavar="ACTIVATIONS",
            help="Directory of 'dlmctl sae-activations', whose first layer and positions the steps "
            "are on; none plants activations, sums of 16 of many directions.",
        ),
    ] = None,
    measures: Annotated[
        str, typer.Option("--measure", metavar="NAMES", help="What to measure: steps, pipeline.")
    ] = "steps,pipeline",
    ks: Annotated[
        str, typer.Option("-k", metavar="K,…", help="Latents that are active for a token.")
    ] = "50,160",
    width: Annotated[int, typer.Option(min=1, help="Of planted activations.")] = 768,
    latents: Annotated[int, typer.Option(min=1, help="Size of the dictionary, in steps.")] = 16_384,
    sae_batch: Annotated[
        int, typer.Option("--sae-batch-size", min=1, help="Activations in a step, in steps.")
    ] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after two that are not.")] = 5,
    model: Annotated[
        str,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="Of the pipeline: random:100m or random:8b, random weights in the shape of LLaDA; "
            "or any model.",
        ),
    ] = "random:100m",
    layers: Annotated[
        str, typer.Option(metavar="L,…", help="Of the pipeline; as deep as DLM-Scope's in LLaDA.")
    ] = "0,3,5,7,11,13",
    positions: Annotated[
        str, typer.Option(metavar="KIND,…", help="Of the pipeline: mask, unmask, all, clean.")
    ] = "mask,unmask",
    expansion: Annotated[
        int,
        typer.Option(min=1, help="Latents for each dimension of the model, in the pipeline."),
    ] = 4,
    tokens: Annotated[
        int,
        typer.Option(
            min=4, help="Activations for each autoencoder of the pipeline, taken in four steps."
        ),
    ] = 2048,
    sequences: Annotated[
        int, typer.Option("-b", "--batch-size", min=1, help="Sequences in a pass of the model.")
    ] = 8,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a sequence.")] = 128,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Training of sparse autoencoders beside plain implementations.

    steps: a step of 'dlmctl sae-train' beside the same step with dense codes under automatic
    differentiation, by turns. Writes for each: tokens per second; ratio to the first row of that k;
    loss of the last step; peak memory in megabytes, on top of weights and moments, and its ratio.

    pipeline: all layers, k and positions from one pass of the model, beside a pass for each layer
    and positions that ends behind the layer, as DLM-Scope was trained. Writes for each: passes of
    the model; seconds and ratio; seconds in the model and ratio; seconds in the autoencoders;
    difference of the weights to those of the first row, relative to their norm.

    Examples:

    dlmctl bench sae

    dlmctl bench sae acts --measure steps -k 50,160,520

    dlmctl bench sae --measure pipeline -m random:8b --layers 1,6,11,16,26,30
    """
    chosen = measures.split(",")
    for name in chosen:
        if name not in MEASURES:
            raise UsageError(f"--measure has no '{name}'; there are: {', '.join(MEASURES)}")
    numbers = whole_numbers("-k", ks)
    if "steps" in chosen:
        _steps(activations, numbers, width, latents, sae_batch, steps, json, seed, device, quiet)
    if "pipeline" not in chosen:
        return
    from dlmctl.bench.sae import Pipeline, compare_pipelines
    from dlmctl.bench.shapes import bench_policy

    policy = bench_policy(model, device, dtype)
    pipeline = Pipeline(
        layer_numbers(layers),
        position_kinds(positions),
        numbers,
        expansion,
        tokens,
        tokens // 4,
        sequences,
        context,
        seed,
    )
    rows = counted(compare_pipelines(policy, pipeline), "rows", quiet, 2)
    write_rows(rows, PIPELINE_COLUMNS, json)


def _steps(
    activations: Path | None,
    ks: list[int],
    width: int,
    latents: int,
    size: int,
    steps: int,
    json: bool,
    seed: int,
    device: str,
    quiet: bool,
) -> None:
    if max(ks) > latents:
        raise UsageError(f"-k {max(ks)} is more than the {latents} --latents")
    from dlmctl.bench.sae import UNTIMED, compare_steps, planted_activations, stored_activations
    from dlmctl.models.loading import resolve_device
    from dlmctl.sae.activations import StoredActivations

    where, batches = resolve_device(device), steps + UNTIMED
    if activations is None:
        data = planted_activations(width, size, batches, seed, where)
    else:
        data = stored_activations(StoredActivations(activations), size, batches, where)
    rows = counted(compare_steps(data, latents, ks, seed), "rows", quiet, 2 * len(ks))
    write_rows(rows, STEPS_COLUMNS, json)
