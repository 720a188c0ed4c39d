"""Training of Top-K autoencoders compared with plain implementations: single steps, and whole runs.

    python tests/benchmarks/sae.py

    python tests/benchmarks/sae.py acts --measure steps -k 50,160,520

    python tests/benchmarks/sae.py --measure pipeline -m random:8b --layers 1,6,11,16,26,30

`--help` lists the options and describes the rows.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from dense_sae import DenseTrainer
from script import script
from torch import Tensor
from torch.nn import functional

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.bench.shapes import bench_policy, random_prompts
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.models.loading import resolve_device
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.activations import (
    ActivationBatch,
    Key,
    StoredActivations,
    check_keys,
    model_activations,
)
from dlmctl.sae.corpus import Document, MaskLaw, masked_corpus
from dlmctl.sae.topk import Codes, combine
from dlmctl.sae.training.stream import Stream
from dlmctl.sae.training.trainer import SaeTrainer
from dlmctl.settings import Knob, knob
from dlmctl.settings.compute import Device, Seed
from dlmctl.settings.corpus import layer_numbers, position_kinds
from dlmctl.settings.parsing import whole_numbers
from dlmctl.settings.sae import SaeRecipe
from dlmctl.settings.streams import Json, Quiet

MEASURES = ("steps", "pipeline")
STEPS_COLUMNS = [
    "measure", "path", "k", "tokens_per_second", "ratio", "loss", "peak_memory_mb", "memory_ratio",
]  # fmt: skip
PIPELINE_COLUMNS = [
    "measure", "path", "passes", "seconds", "ratio", "model_seconds", "model_ratio", "sae_seconds",
    "difference",
]  # fmt: skip
NEVER = 2**62
"""Activations after which a latent counts as dead, so that no step has an auxiliary loss."""
UNTIMED = 2
"""First steps: the first allocates everything, the second measures memory."""


@dataclass(frozen=True)
class Steps:
    """Steps of one autoencoder."""

    width: int = knob(768, "Width of planted activations.", "--width", minimum=1)
    latents: int = knob(16_384, "Size of the dictionary, in steps.", "--latents", minimum=1)
    batch_size: int = knob(2048, "Activations in a step, in steps.", "--sae-batch-size", minimum=1)
    steps: int = knob(5, "Timed steps, after two that are not timed.", "--steps", minimum=1)


@dataclass(frozen=True)
class Pipeline:
    """A run that trains autoencoders of several layers, positions and K."""

    model: str = knob(
        "random:100m",
        "Model of the pipeline: random:100m or random:8b, random weights in the shape of LLaDA; or "
        "any model.",
        "-m",
        "--model",
        metavar="MODEL",
    )
    layers: str = knob(
        "0,3,5,7,11,13",
        "Layers of the pipeline; as deep as DLM-Scope's in LLaDA.",
        "--layers",
        metavar="L,…",
    )
    positions: str = knob(
        "mask,unmask",
        "Positions of the pipeline: mask, unmask, all, clean.",
        "--positions",
        metavar="KIND,…",
    )
    expansion: int = knob(
        4,
        "Latents for each dimension of the model, in the pipeline.",
        "--expansion",
        minimum=1,
    )
    tokens: int = knob(
        2048,
        "Activations for each autoencoder of the pipeline, taken in four steps.",
        "--tokens",
        minimum=4,
    )
    sequences: int = knob(8, "Sequences in a pass of the model.", "-b", "--batch-size", minimum=1)
    context: int = knob(128, "Tokens of a sequence.", "--context", minimum=2)


def command(
    activations: Annotated[
        Path | None,
        Knob(
            "Directory of 'dlmctl sae-activations', whose first layer and positions the steps are "
            "on; none plants activations, sums of 16 of many directions.",
            metavar="ACTIVATIONS",
            argument=True,
        ),
    ] = None,
    measures: Annotated[
        str, Knob("What to measure: steps, pipeline.", "--measure", metavar="NAMES")
    ] = "steps,pipeline",
    ks: Annotated[
        str, Knob("Latents that are active for a token.", "-k", metavar="K,…")
    ] = "50,160",
    single: Steps = Steps(),
    pipeline: Pipeline = Pipeline(),
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = Device(),
) -> None:
    """Training of sparse autoencoders compared with plain implementations.

    steps: a step of 'dlmctl sae-train' compared with the same step with dense codes under automatic
    differentiation; the two take turns. Writes for each: tokens per second; ratio to the first row
    of that k; loss of the last step; peak memory in megabytes, on top of weights and moments, and
    its ratio.

    pipeline: all layers, k and positions from one pass of the model, compared with a pass for each
    layer and positions that ends after the layer, as DLM-Scope was trained. Writes for each: passes
    of the model; seconds and ratio; seconds in the model and ratio; seconds in the autoencoders;
    difference of the weights to those of the first row, relative to their norm.
    """
    chosen = measures.split(",")
    for name in chosen:
        if name not in MEASURES:
            raise UsageError(f"--measure has no '{name}'; there are: {', '.join(MEASURES)}")
    numbers = whole_numbers("-k", ks)
    if "steps" in chosen:
        if max(numbers) > single.latents:
            raise UsageError(f"-k {max(numbers)} is more than the {single.latents} --latents")
        where, batches = resolve_device(device.device), single.steps + UNTIMED
        if activations is None:
            data = planted_activations(single.width, single.batch_size, batches, seed, where)
        else:
            stored = StoredActivations(activations)
            data = stored_activations(stored, single.batch_size, batches, where)
        rows = compare_steps(data, single.latents, numbers, seed)
        write_rows(counted(rows, "rows", quiet, 2 * len(numbers)), STEPS_COLUMNS, json)
    if "pipeline" in chosen:
        policy = bench_policy(pipeline.model, device.device, device.dtype)
        rows = compare_pipelines(policy, pipeline, numbers, seed)
        write_rows(counted(rows, "rows", quiet, 2), PIPELINE_COLUMNS, json)


def planted_activations(
    width: int, batch_size: int, batches: int, seed: int, device: torch.device
) -> list[Tensor]:
    """Batches [N, d] of sums of 16 of 8 d fixed directions, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = functional.normalize(torch.randn(8 * width, width, generator=generator), dim=1)
    made = []
    for _ in range(batches):
        chosen = torch.randint(8 * width, (batch_size, 16), generator=generator)
        sizes = torch.rand(batch_size, 16, generator=generator)
        sums = combine(Codes(sizes, chosen), directions)
        noise = torch.randn(batch_size, width, generator=generator) / width**0.5
        made.append((sums + 0.1 * noise).to(device))
    return made


def stored_activations(
    stored: StoredActivations, batch_size: int, batches: int, device: torch.device
) -> list[Tensor]:
    """Batches [N, d] of the first layer and positions of a directory, in their order."""
    key = Key(stored.index["layers"][0], stored.index["positions"][0])
    made: list[Tensor] = []
    waiting = torch.empty(0, int(stored.index["width"]), device=device)
    for block in stored.blocks([key], device):
        waiting = torch.cat([waiting, block[key].float()])
        made += waiting.split(batch_size)[: len(waiting) // batch_size]
        waiting = waiting[len(waiting) // batch_size * batch_size :]
        if len(made) >= batches:
            break
    return made[:batches]


def compare_steps(
    batches: Sequence[Tensor], latents: int, ks: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """For each K a row of dense codes under automatic differentiation, and one of `sae-train`.

    Both start from the same weights and take each batch in turn; the first two steps are not timed.

    Yields:
        Dicts with tokens_per_second, by the median of the steps; ratio, to the first row's of this
        K; loss, that of the last step; peak_memory_mb of a step, on top of weights and moments, and
        memory_ratio, to the first row's.
    """
    size, device = len(batches[0]), batches[0].device
    for k in ks:
        tokens = size * len(batches)
        recipe = SaeRecipe(latents, size, tokens, dead_after=NEVER, seed=seed)
        ours = SaeTrainer(recipe, batches[0].shape[1], k, seed, device)
        ours.begin(batches[0])
        dense = DenseTrainer(ours)
        ways: dict[str, Callable[[Tensor], float]] = {
            "dense": dense.train_step,
            "sae-train": lambda x, trainer=ours: trainer.train_step(x)["l2"],  # type: ignore[misc]
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        peaks: dict[str, Peak] = {}
        losses: dict[str, float] = {}
        for number, x in enumerate(batches):
            for name, step in ways.items():
                if number == UNTIMED - 1:
                    peaks[name] = Peak(device)
                    with peaks[name]:
                        step(x)
                    continue
                begun = time.perf_counter()
                losses[name] = step(x)
                synchronize(device)
                if number >= UNTIMED:
                    seconds[name].append(time.perf_counter() - begun)
        speeds = {name: size / statistics.median(times) for name, times in seconds.items()}
        base = peaks["dense"].megabytes
        for name, speed in speeds.items():
            peak = peaks[name].megabytes
            yield {
                "measure": "steps",
                "path": name,
                "k": k,
                "steps": len(batches) - UNTIMED,
                "tokens_per_second": speed,
                "ratio": speed / speeds["dense"],
                "loss": losses[name],
                "peak_memory_mb": peak,
                "memory_ratio": peak / base if peak is not None and base else None,
            }


def compare_pipelines(
    policy: Policy, pipeline: Pipeline, ks: Sequence[int], seed: int
) -> Iterator[dict[str, Any]]:
    """A row for one pass per layer and positions, as published, and one for a pass shared by all.

    A published pass ends after its layer, and feeds all K. Levels are drawn from 0.05 to 0.5, as
    published, so that there are fewer masked tokens than visible ones; the passes for one kind of
    positions end when its autoencoders have seen all their activations.

    Raises:
        UsageError: the model has no such layer, or K is more than there are latents.

    Yields:
        Dicts with seconds and their ratio; model_seconds and sae_seconds, their parts; model_ratio;
        passes of the model; difference, of all weights to the first row's, relative to their norm.
    """
    layers, kinds = layer_numbers(pipeline.layers), position_kinds(pipeline.positions)
    check_keys(policy, layers, kinds)
    keys = [Key(layer, kind) for layer in layers for kind in kinds]
    first = next(_batches(policy, pipeline, keys[-1:], seed))  # allocates everything
    width = first[keys[-1]].shape[1]
    latents = pipeline.expansion * width
    if max(ks) > latents:
        raise UsageError(f"-k {max(ks)} is more than {latents} latents: see --expansion")
    size = pipeline.tokens // 4
    recipe = SaeRecipe(latents, size, pipeline.tokens, dead_after=NEVER, seed=seed)
    base: dict[str, Any] = {}
    for name, groups in (("per layer", [[key] for key in keys]), ("shared", [keys])):
        streams = {
            key: Stream(key, ks, recipe, width, pipeline.tokens, None, policy.device)
            for key in keys
        }
        passes, model, sae = 0, 0.0, 0.0
        for group in groups:
            blocks = _batches(policy, pipeline, group, seed)
            more = _train([streams[key] for key in group], blocks, policy.device)
            passes, model, sae = passes + more[0], model + more[1], sae + more[2]
        trainers = [t for key in keys for t in streams[key].trainers.values()]
        weights = torch.cat([p.detach().flatten() for t in trainers for p in t.sae.parameters()])
        base = base or {"seconds": model + sae, "model": model, "weights": weights}
        yield {
            "measure": "pipeline",
            "path": name,
            "autoencoders": len(trainers),
            "passes": passes,
            "seconds": model + sae,
            "ratio": base["seconds"] / (model + sae),
            "model_seconds": model,
            "sae_seconds": sae,
            "model_ratio": base["model"] / model,
            "difference": float((weights - base["weights"]).norm() / base["weights"].norm()),
        }


def _batches(
    policy: Policy, pipeline: Pipeline, keys: Sequence[Key], seed: int
) -> Iterator[ActivationBatch]:
    """Activations of random text; text and masks do not depend on the keys."""

    def texts() -> Iterator[Document]:
        number = 0
        while True:
            length = pipeline.context
            for ids in random_prompts(policy, pipeline.sequences, length, length):
                yield Document(number, ids, 1, Record())
                number += 1

    law = MaskLaw(0.05, 0.5, seed=seed)
    batches = masked_corpus(texts(), policy, law, pipeline.sequences)
    layers = list(dict.fromkeys(key.layer for key in keys))
    positions = list(dict.fromkeys(key.positions for key in keys))
    return model_activations(policy, batches, layers, positions)


def _train(
    streams: Sequence[Stream], blocks: Iterator[ActivationBatch], device: torch.device
) -> tuple[int, float, float]:
    """Passes of the model, seconds in it, and seconds in the autoencoders."""
    passes, model, sae = 0, 0.0, 0.0
    while any(stream.wanted for stream in streams):
        begun = time.perf_counter()
        block = next(blocks)
        synchronize(device)
        had = time.perf_counter()
        for stream in streams:
            stream.add(block[stream.key])
            for _ in stream.train():
                pass
        synchronize(device)
        passes, model, sae = passes + 1, model + had - begun, sae + time.perf_counter() - had
    begun = time.perf_counter()
    for stream in streams:
        for _ in stream.train(last=True):
            pass
    synchronize(device)
    return passes, model, sae + time.perf_counter() - begun


app = script(command)

if __name__ == "__main__":
    app()
