"""Training of Top-K autoencoders beside plain implementations: single steps, and the whole run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.bench.dense_sae import DenseTrainer
from dlmctl.bench.memory import Peak, synchronize
from dlmctl.bench.shapes import random_prompts
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
from dlmctl.sae.corpus import Document, MaskLaw, Positions, masked_corpus
from dlmctl.sae.topk import Codes, combine
from dlmctl.sae.training.stream import Stream
from dlmctl.sae.training.trainer import SaeTrainer
from dlmctl.settings.sae import SaeRecipe

UNTIMED = 2
"""First steps: one has everything allocated, one is for the memory."""
NEVER = 2**62
"""Activations after which a latent counts as dead, so that no step has an auxiliary loss."""


def planted_activations(
    width: int, batch_size: int, batches: int, seed: int, device: torch.device
) -> list[Tensor]:
    """Batches [N, d] of sums of 16 of 8 d fixed directions, and a little noise."""
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

    Both take the batches in turn, from the same weights on; the first two steps are not timed.

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
        speeds = {name: size / statistics.median(found) for name, found in seconds.items()}
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


@dataclass(frozen=True)
class Pipeline:
    """What a run consists of."""

    layers: Sequence[int]
    positions: Sequence[Positions]
    ks: Sequence[int]
    expansion: int
    """Latents for each dimension of the model."""
    tokens: int
    """Activations that each autoencoder is trained on."""
    batch_size: int
    """Activations in a step."""
    sequences: int
    """Sequences in a pass of the model."""
    context: int
    """Their length."""
    seed: int


def compare_pipelines(policy: Policy, pipeline: Pipeline) -> Iterator[dict[str, Any]]:
    """A row for one pass per layer and positions, as published, and one for a pass shared by all.

    A published pass ends behind its layer, and feeds all K. Levels are drawn from 0.05 to 0.5, as
    published, so that there are fewer hidden tokens than visible ones; a pass per positions ends
    when they have had their activations.

    Raises:
        UsageError: the model has no such layer, or K is more than there are latents.

    Yields:
        Dicts with seconds and their ratio; model_seconds and sae_seconds, their parts; model_ratio;
        passes of the model; difference, of all weights to the first row's, relative to their norm.
    """
    check_keys(policy, pipeline.layers, pipeline.positions)
    keys = [Key(layer, kind) for layer in pipeline.layers for kind in pipeline.positions]
    first = next(_blocks(policy, pipeline, keys[-1:]))  # has everything allocated
    width = first[keys[-1]].shape[1]
    if max(pipeline.ks) > (latents := pipeline.expansion * width):
        raise UsageError(f"-k {max(pipeline.ks)} is more than {latents} latents: see --expansion")
    base: dict[str, Any] = {}
    for name, groups in (("per layer", [[key] for key in keys]), ("shared", [keys])):
        streams = {key: _stream(key, pipeline, width, policy.device) for key in keys}
        passes, model, sae = 0, 0.0, 0.0
        for group in groups:
            blocks = _blocks(policy, pipeline, group)
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


def _blocks(policy: Policy, pipeline: Pipeline, keys: Sequence[Key]) -> Iterator[ActivationBatch]:
    """Activations of random text, the same text and masks whatever the keys."""

    def texts() -> Iterator[Document]:
        number = 0
        while True:
            length = pipeline.context
            for ids in random_prompts(policy, pipeline.sequences, length, length):
                yield Document(number, ids, 1, Record())
                number += 1

    law = MaskLaw(0.05, 0.5, seed=pipeline.seed)
    batches = masked_corpus(texts(), policy, law, pipeline.sequences)
    layers = list(dict.fromkeys(key.layer for key in keys))
    positions = list(dict.fromkeys(key.positions for key in keys))
    return model_activations(policy, batches, layers, positions)


def _stream(key: Key, pipeline: Pipeline, width: int, device: torch.device) -> Stream:
    recipe = SaeRecipe(
        pipeline.expansion * width,
        pipeline.batch_size,
        pipeline.tokens,
        dead_after=NEVER,
        seed=pipeline.seed,
    )
    return Stream(key, pipeline.ks, recipe, width, 4 * width * pipeline.tokens, None, device)


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
            for _ in stream.train(stream.buffer.capacity // 2):
                pass
        synchronize(device)
        passes, model, sae = passes + 1, model + had - begun, sae + time.perf_counter() - had
    begun = time.perf_counter()
    for stream in streams:
        for _ in stream.train(0):
            pass
    synchronize(device)
    return passes, model, sae + time.perf_counter() - begun
