"""What a device does at the sizes of a training run, part by part: `dlmctl bench gpu`.

Speed does not depend on how many blocks a completion has, so that its last block alone is sampled,
with everything before it as the prompt. Operations are those of plan/flops, by which `dlmctl plan`
carries figures over to other sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import platform
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from dlmctl.bench.measuring import (
    NO_MEMORY,
    LeftOutError,
    Measurement,
    Prepared,
    Stopwatch,
    measured,
)
from dlmctl.bench.rollout import sampler_paths
from dlmctl.bench.shapes import bench_policy, random_prompts
from dlmctl.bench.update import GradientWork
from dlmctl.diffusion.noise import stream_key
from dlmctl.diffusion.sampler import sample_stream
from dlmctl.diffusion.sampling import Request, SamplerConfig
from dlmctl.memorization.images.neighbours import nearest
from dlmctl.models.policy import Policy
from dlmctl.plan.flops import counts, denoising
from dlmctl.plan.measured import tokens_in_pass
from dlmctl.records.errors import UsageError
from dlmctl.sae.training.trainer import SaeTrainer
from dlmctl.settings.bench import DeviceWork, GradientStep, SamplerPaths
from dlmctl.settings.compute import Device
from dlmctl.settings.optimizer import Adapter
from dlmctl.settings.parsing import whole_numbers
from dlmctl.settings.sae import SaeRecipe
from dlmctl.settings.sampler import SAMPLED
from dlmctl.train.activations import checkpoint_activations, checkpoints_activations
from dlmctl.train.lora import add_adapter

PATHS = ("exact", "dual", "dual+threshold")
TEMPERATURES = (SAMPLED.temperature, 0.0)
SHARES = {"rollout": 0.6, "compile": 0.7}
"""Of the time, by the end of which these parts must be done, so that the others get some."""
ACTIVE, ACTIVATIONS, SAE_STEPS = 50, 2048, 4
"""K of the autoencoder, activations in a step, and steps that are timed."""
NUMBERS = 3 * 32 * 32
"""Numbers in a vector, as in a small image."""
PART = 8
"""The warm-up is about this part of the work."""


def device_figures(model: str, work: DeviceWork, device: Device) -> Iterator[dict[str, Any]]:
    """A record of each measurement.

    Yields:
        Dicts with what; value and unit; settings; seconds; tflops, if operations are counted;
        peak_memory_mb, on top of what was in use before; or left_out, the reason why there is no
        value; and model, parameters, device, dtype.

    Raises:
        UsageError: an option makes no sense, or the model does not attend to the whole sequence.
    """
    sizes, parts = whole_numbers("--batch-size", work.batch_sizes), work.chosen
    policy = bench_policy(model, device.device, device.dtype)
    if not policy.diffusion or policy.blocks is not None:
        raise UsageError(
            f"bench gpu measures diffusion models that attend to the whole sequence, and {model} "
            "is not one"
        )
    about = {
        "model": model,
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "device": device_name(policy.device),
        "dtype": str(next(policy.model.parameters()).dtype).removeprefix("torch."),
    }
    yield from measured(
        _all(policy, work, sizes, parts), Stopwatch(policy.device, work.seconds), about
    )


def device_name(device: torch.device) -> str:
    """What a device is."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"


def _all(
    policy: Policy, work: DeviceWork, sizes: Sequence[int], parts: Sequence[str]
) -> Iterator[Prepared]:
    """What to measure in the order of PARTS: the adapter, which stays, comes when all sampling is
    done."""
    sizes, width = sorted(sizes, reverse=True), policy.width
    shares = {**SHARES, parts[-1]: 1.0}
    if "rollout" in parts:
        for size, temperature, path in itertools.product(sizes, TEMPERATURES, PATHS):
            prepare = partial(sampling, policy, work, path, temperature, size)
            yield Prepared("rollout", prepare, shares["rollout"])
    if "compile" in parts:
        for size in sizes:
            prepare = partial(sampling, policy, work, "compiled", 0.0, size)
            yield Prepared("rollout", prepare, shares["compile"])
    if "scoring" in parts:
        yield Prepared("scoring", partial(scoring, policy, work))
    if "update" in parts:
        adapted = functools.cache(lambda: add_adapter(policy, Adapter(work.rank)))
        for recomputes in (False, True):
            yield Prepared("update", partial(updating, adapted, work, recomputes))
    if "sae" in parts:
        yield Prepared("sae", partial(autoencoder, work, width, policy.device))
    if "neighbours" in parts:
        yield Prepared("neighbours", partial(neighbours, work, policy.device))


def sampling(
    policy: Policy, work: DeviceWork, path: str, temperature: float, size: int
) -> Measurement:
    """Sampling the last block of `size` completions."""
    block = work.block
    options = SamplerPaths(
        gen_length=block.gen_length,
        block_length=block.block_length,
        steps=block.steps,
        temperature=temperature,
        threshold=work.threshold,
    )
    settings = sampler_paths(policy, options)[path]
    if path == "dual+threshold":  # a fixed number of steps at most, as the recipes have it
        settings = dataclasses.replace(settings, steps=block.steps)
    prompts = random_prompts(policy, size, work.before, work.before)
    requests = [Request(ids, stream_key(work.seed, n)) for n, ids in enumerate(prompts)]
    steps = settings.steps_per_block
    few = max(1, steps // PART)

    def run(config: SamplerConfig) -> dict[str, Any]:
        samples = list(sample_stream(policy, requests, config, size))
        return {"nfe": sum(sample.nfe for sample in samples) / size}

    flops = None
    if settings.threshold is None:
        each = denoising(counts(policy, False), settings, work.before, policy.shift)
        flops = size * each
    return Measurement(
        "tokens/s",
        size * settings.gen_length,
        lambda: run(settings),
        lambda: run(dataclasses.replace(settings, steps=few, threshold=None)),
        steps / few,
        {
            "path": path,
            "temperature": temperature,
            "batch_size": size,
            "cache": settings.cache,
            "threshold": settings.threshold,
            "compile": settings.compile,
            "prompt_length": work.prompt_length,
            "gen_length": work.gen_length,
            "block_length": work.block_length,
            "steps": work.steps,
            "pass_tokens": size * tokens_in_pass(settings, work.before),
        },
        flops,
    )


def scoring(policy: Policy, work: DeviceWork) -> Measurement:
    """ELBO of the completions."""
    model, length = counts(policy, False), work.prompt_length + work.gen_length
    whole, few, ratio = _gradients(policy, work)

    def run() -> None:
        whole.scores(work.micro_batch)

    return Measurement(
        "completions/s",
        work.completions,
        run,
        lambda: few.scores(work.micro_batch),
        ratio,
        _step_settings(work),
        work.completions * work.masks * model.scoring(length, work.gen_length / 2),
    )


def updating(adapted: Callable[[], Policy], work: DeviceWork, recomputes: bool) -> Measurement:
    """One RSPO gradient of an adapter; once activations are recomputed, they always are."""
    policy = adapted()
    if recomputes:
        checkpoint_activations(policy.core)
    model, length = counts(policy, recomputes), work.prompt_length + work.gen_length
    whole, few, ratio = _gradients(policy, work)
    dtype = next(policy.model.parameters()).dtype

    def run(gradients: GradientWork) -> None:
        low = dtype in (torch.bfloat16, torch.float16)
        try:
            with torch.autocast(policy.device.type, dtype, low, cache_enabled=False):  # as training
                gradients.update(work.micro_batch)
        finally:
            policy.model.zero_grad(set_to_none=True)
        if checkpoints_activations(policy.core) != recomputes:
            raise LeftOutError(NO_MEMORY)  # without recomputing, which has begun by itself

    # Scores under policy and reference, and the gradient.
    each = model.training(length, work.gen_length / 2, 2, 1)
    return Measurement(
        "completions/s",
        work.completions,
        lambda: run(whole),
        lambda: run(few),
        ratio,
        {**_step_settings(work), "lora_rank": work.rank, "gradient_checkpointing": recomputes},
        work.completions * work.masks * each,
    )


def _gradients(policy: Policy, work: DeviceWork) -> tuple[GradientWork, GradientWork, float]:
    """The work of a step, some of it, and how many times as much the first is."""
    step = GradientStep(work.gen_length, work.prompt_length, work.completions, work.masks)
    few = dataclasses.replace(step, completions=2)
    parts = GradientWork(policy, None, step), GradientWork(policy, None, few)
    return *parts, step.completions / few.completions


def _step_settings(work: DeviceWork) -> dict[str, Any]:
    return {
        "batch_size": work.micro_batch,
        "completions": work.completions,
        "masks": work.masks,
        "prompt_length": work.prompt_length,
        "gen_length": work.gen_length,
    }


def autoencoder(work: DeviceWork, width: int, device: torch.device) -> Measurement:
    """Steps of an autoencoder for activations as wide as the model, which are random here."""
    latents = work.latents or min(4 * width, 16_384)
    k = min(ACTIVE, latents)
    trainer = SaeTrainer(SaeRecipe(latents, ACTIVATIONS), width, k, work.seed, device)
    x = torch.randn(ACTIVATIONS, width, generator=torch.Generator().manual_seed(work.seed))
    x = x.to(device)
    trainer.begin(x)

    def run(steps: int) -> None:
        for _ in range(steps):
            trainer.train_step(x, measured=False)

    return Measurement(
        "activations/s",
        SAE_STEPS * ACTIVATIONS,
        lambda: run(SAE_STEPS),
        lambda: run(1),
        SAE_STEPS,
        {"batch_size": ACTIVATIONS, "width": width, "latents": latents, "k": k},
    )


def neighbours(work: DeviceWork, device: torch.device) -> Measurement:
    """The two nearest neighbours of each vector among as many others, exactly."""
    number = work.vectors or (50_000 if device.type == "cuda" else 2_000)
    generator = torch.Generator().manual_seed(work.seed)
    x, y = (torch.randn(number, NUMBERS, generator=generator).to(device) for _ in range(2))
    few = x[: max(1, number // PART)]

    def run() -> None:
        nearest(x, y)

    return Measurement(
        "vectors/s",
        number,
        run,
        lambda: nearest(few, y),
        number / len(few),
        {"vectors": number, "references": number, "width": NUMBERS},
        2.0 * NUMBERS * number**2,
    )
