"""What a training run needs of its devices: memory by part, traffic, operations, time.

A step is a round of `rollout | verify | update`: completions are sampled, scored under policy and
reference as the algorithm requires, and one gradient or several are computed from them. Memory
comes from plan/footprint, operations from plan/flops. With FSDP2 (train/sharding), every pass of
every micro-batch gathers the weights that it uses, in the dtype in which it uses them; with N
devices, W bytes of such weights and G of gradients:

    without gradient   gather W (N - 1) / N          received by each device
    with gradient      gather 2 W (N - 1) / N, and scatter G (N - 1) / N

Time is operations divided by the measured speed of one device, plus traffic divided by the
bandwidth, as if neither hid the other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dlmctl.diffusion.sampling import SamplerConfig, configured
from dlmctl.diffusion.scoring import MaskPlan, mask_plan
from dlmctl.models.architecture import FAULTS
from dlmctl.models.loading import resolve_dtype
from dlmctl.models.policy import Policy
from dlmctl.models.quantization import quantizable
from dlmctl.models.weightless import weightless_policy
from dlmctl.plan.duration import add_seconds
from dlmctl.plan.flops import Counts, counts, denoising, left_to_right
from dlmctl.plan.footprint import (
    Passing,
    dequantized,
    gradient_memory,
    kept_memory,
    sampling_memory,
    scoring_memory,
    tower_memory,
    units,
)
from dlmctl.records.errors import DataError, UsageError, reason_of
from dlmctl.rl.credit_stage import credit_passes
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Passes, passes_for
from dlmctl.settings.algorithms import RECIPES, Algorithm, check_kind
from dlmctl.settings.compute import Quantization
from dlmctl.settings.mask_laws import ORDERED
from dlmctl.settings.masks import Masks
from dlmctl.settings.objective import Constants
from dlmctl.settings.optimizer import Adapter
from dlmctl.settings.plan import Machine, Options, Step
from dlmctl.settings.sampler import Sampler
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.lora import add_adapter

MOST_DEVICES = 1024
LITERATURE_RANK = 128
"""Rank of the adapter that is proposed if all weights do not fit."""


@dataclass(frozen=True)
class Work:
    """What a step does."""

    step: Step
    masks: int
    scored: float
    """Share of a completion's tokens that a mask scores, on average."""
    passes: Passes
    contrasts: int
    """Passes of `advantage --algo srpo` over each completion; 0 without it."""
    sampling: SamplerConfig
    copied: int
    """Tokens of the noised copy that a block-causal model is scored with."""

    @property
    def completions(self) -> int:
        return self.step.prompts_per_step * self.step.completions

    @property
    def tokens(self) -> int:
        """Tokens of all completions."""
        return self.completions * self.sampling.gen_length

    @property
    def prompt_length(self) -> int:
        return self.step.prompt_length + self.step.image_tokens

    @property
    def length(self) -> int:
        """Tokens of a row that is scored."""
        return self.prompt_length + self.sampling.gen_length + self.copied


def work_of(
    options: Options,
    algo: Algorithm,
    constants: Constants,
    inner: int | None,
    masks: Masks,
    step: Step,
    sampler: Sampler,
) -> Work:
    """The work of a step of `update --algo`; what is None is as the algorithm was published.

    Raises:
        UsageError: the algorithm does not have such a constant, or does not train such a model; the
            model takes no images.
    """
    policy = weightless_policy(options.model, _dtype(options))
    if step.image_tokens and not policy.model_family.takes_images:
        raise UsageError(f"{options.model} takes no images: leave --image-tokens out")
    constants.of(algo)
    check_kind(algo, policy.diffusion, options.model)
    recipe, passes, sampling = RECIPES[algo], Passes(0, 0, 1), configured(policy, sampler)
    if algo == "sft":
        step = replace(step, completions=1, rollout_batch_size=0)  # nothing is sampled
    else:
        sampled = recipe.sampled_old and not policy.diffusion
        objective = make_objective(algo, beta=constants.beta)
        passes = passes_for(objective, inner or recipe.inner, sampled)
    drawn = mask_plan(masks, 0, recipe)
    count, scored = _masks(drawn, sampling, policy) if policy.diffusion else (1, 1.0)
    return Work(
        step=step,
        masks=count,
        scored=scored,
        passes=passes,
        contrasts=credit_passes(policy.diffusion) if algo == "srpo" else 0,
        sampling=sampling,
        copied=sampling.gen_length if policy.blocks else 0,
    )


def _masks(plan: MaskPlan, sampling: SamplerConfig, policy: Policy) -> tuple[int, float]:
    """Masks of a completion, and the share of its tokens that each of them scores on average."""
    if plan.law in ORDERED:
        # One mask has a step of every block of a block-causal model.
        blocks = 1 if policy.blocks else sampling.blocks
        steps = min(sampling.gen_length, blocks * sampling.block_length)
        if plan.law == "trajectory":
            steps = math.ceil(min(steps, blocks * sampling.steps_per_block) / plan.shrink)
        return plan.samples or steps, 1 / steps
    if plan.law == "coupled":
        return plan.samples, 2 / 3
    return plan.samples, 1.0 if plan.law == "full" else 0.5


def plan(options: Options, work: Work, machine: Machine) -> Iterator[dict[str, Any]]:
    """A record for each stage that has the model, and one for the whole step.

    Raises:
        DataError: the model cannot run, whatever its weights.
    """
    try:
        records = [*_before_update(options, work), update_record(options, work)]
    except FAULTS as error:
        reason = reason_of(error)
        raise DataError(f"no model of this shape can run ({reason})", options.model) from None
    speed = None if machine.tflops is None else machine.tflops * 1e12
    if machine.tokens_per_second is not None and work.step.rollout_batch_size:
        speed = speed or records[0]["flops"] / work.tokens * machine.tokens_per_second
    for record in records:
        if machine.memory is not None:
            record["fits"] = machine.fits(record["total"])
        add_seconds(record, machine, speed, options.gpus, work.tokens)
        yield record
    yield _step(records, options, work, machine)


def _dtype(options: Options) -> torch.dtype:
    """The dtype on the GPUs that the plan is for."""
    return resolve_dtype(options.dtype, torch.device("cuda"))


def _before_update(options: Options, work: Work) -> list[dict[str, Any]]:
    """Records of the other stages that have the model: each has all of it on each device."""
    step, sampling = work.step, work.sampling
    if not step.rollout_batch_size:
        return []
    # 1. rollout
    policy = weightless_policy(options.model, _dtype(options))
    policy = replace(policy, quantized=options.quantize)
    if options.rank:
        policy = add_adapter(policy, Adapter(options.rank))
    model, weights = counts(policy, False), kept_memory(policy, 1).weights
    whole = dequantized(policy)
    each = sampling_operations(policy, work)
    images = step.prompts_per_step * model.images(step.image_tokens, False)
    cached, passing = sampling_memory(policy, sampling, step.rollout_batch_size, work.prompt_length)
    passing = passing._replace(activations=passing.activations + whole)
    parts = {"weights": weights, "cache": round(cached), **_parts(passing)}
    total, flops = weights + cached + passing.total, work.completions * each + images
    records = [_record("rollout", parts, total, flops)]
    # 2. advantage --algo srpo, whose passes have no gradient, in a process of its own
    if work.contrasts:
        scoring = model.scoring(work.length, work.scored * sampling.gen_length)
        passing = scoring_memory(
            policy, options.batch_size, work.length, sampling.gen_length, torch.float32
        )
        passing = passing._replace(activations=passing.activations + whole)
        parts = {"weights": weights, **_parts(passing)}
        flops = work.contrasts * work.completions * scoring
        flops += work.contrasts * images
        records.append(_record("advantage", parts, weights + passing.total, flops))
    return records


def sampling_operations(policy: Policy, work: Work) -> float:
    """Operations of one completion, its image aside."""
    model = counts(policy, False)
    if not policy.diffusion:
        return left_to_right(model, work.sampling.gen_length, work.prompt_length)
    return denoising(model, work.sampling, work.prompt_length, policy.shift, policy.blocks)


@functools.cache
def _trained_policy(
    model: str,
    dtype: torch.dtype,
    rank: int,
    quantize: Quantization | None,
    recomputes: bool,
) -> Policy:
    """The policy as `open_run` loads it, without weights."""
    policy = weightless_policy(model, dtype if rank else torch.float32)
    policy = replace(policy, quantized=quantize)
    if rank:
        policy = add_adapter(policy, Adapter(rank))
    if recomputes:
        checkpoint_activations(policy.core)
    return policy


def _trainer(options: Options) -> Policy:
    recomputes = options.gradient_checkpointing
    return _trained_policy(
        options.model, _dtype(options), options.rank, options.quantize, recomputes
    )


def update_record(options: Options, work: Work) -> dict[str, Any]:
    """`update` under torchrun with as many ranks as there are devices."""
    policy = _trainer(options)
    model = counts(policy, options.gradient_checkpointing)
    kept = kept_memory(policy, options.gpus, options.optimizer)
    copied = work.passes.reference and not options.rank
    reference = kept.weights if copied else 0
    gathered = 0
    if options.gpus > 1:
        gathered = units(policy, options.gpus, _dtype(options)).gathered
    passing = _training_passes(policy, model, options, work)
    parts = {
        "weights": kept.weights,
        "gradients": kept.gradients,
        "moments": kept.moments,
        "reference": reference,
        "gathered": gathered,
        **_parts(passing),
    }
    total = kept.weights + kept.gradients + kept.moments + reference + gathered + passing.total
    record = _record("update", parts, total, _update_operations(model, options, work))
    if options.gpus > 1:
        record |= _traffic(policy, options, work)
    return record


def _training_passes(policy: Policy, model: Counts, options: Options, work: Work) -> Passing:
    """Memory of a micro-batch, with its images."""
    rows = min(options.batch_size, work.completions * work.masks)
    dtype = _dtype(options)
    passing = gradient_memory(policy, rows, work.length, work.sampling.gen_length, dtype)
    passing = passing._replace(activations=passing.activations + dequantized(policy))
    if model.tower is None or not work.step.image_tokens:
        return passing
    images = math.ceil(rows / work.step.completions)  # the samples of a prompt share its image
    patches = images * work.step.image_tokens * model.tower.per_token
    tower = tower_memory(policy, patches, model.tower.patches.trained > 0, dtype)
    return passing._replace(activations=passing.activations + tower)


def _update_operations(model: Counts, options: Options, work: Work) -> float:
    scored, passes = work.scored * work.sampling.gen_length, work.passes
    plain = passes.policy + passes.reference
    rows, image_tokens = work.completions * work.masks, work.step.image_tokens
    images = math.ceil(rows / min(work.step.completions, options.batch_size))
    return rows * model.training(work.length, scored, plain, passes.gradient) + images * (
        plain * model.images(image_tokens, False)
        + passes.gradient * model.images(image_tokens, True)
    )


def _traffic(policy: Policy, options: Options, work: Work) -> dict[str, Any]:
    """Micro-batches of a rank, and bytes that it receives in a step."""
    moved, passes = units(policy, options.gpus, _dtype(options)), work.passes
    weights = moved.root + sum(moved.blocks)
    gradients = moved.root_gradients + sum(moved.gradients)
    batches = math.ceil(work.completions * work.masks / (options.gpus * options.batch_size))
    share = (options.gpus - 1) / options.gpus
    gathers = passes.policy + passes.reference + 2 * passes.gradient
    return {
        "micro_batches": batches,
        "gather": round(batches * gathers * weights * share),
        "scatter": round(batches * passes.gradient * gradients * share),
    }


def _parts(passing: Passing) -> dict[str, int]:
    return {name: round(value) for name, value in passing._asdict().items()}


def _record(stage: str, parts: dict[str, int], total: float, flops: float) -> dict[str, Any]:
    return {"stage": stage, **parts, "total": round(total), "flops": round(flops)}


def _total(totals: list[int], gpus: int) -> int:
    """One device has all stages at once, as in a pipe; several have them in turn."""
    return sum(totals) if gpus == 1 else max(totals)


def _step(
    records: list[dict[str, Any]], options: Options, work: Work, machine: Machine
) -> dict[str, Any]:
    """The stages together."""
    total = _total([record["total"] for record in records], options.gpus)
    parameters = list(_trainer(options).model.parameters())
    record: dict[str, Any] = {
        "stage": "step",
        "model": options.model,
        "options": options.line(),
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "completions": work.completions,
        "tokens": work.tokens,
        "total": total,
        **({} if machine.memory is None else {"fits": machine.fits(total)}),
        "flops": sum(one["flops"] for one in records),
    }
    if all("seconds" in one for one in records):
        seconds = sum(one["seconds"] for one in records)
        record |= {"seconds": seconds, "tokens_per_second": work.tokens / seconds}
        record["tflops"] = record["flops"] / seconds / options.gpus / 1e12
    if not record.get("fits", True):
        record["changes"] = [change.line() for change in changes(options, work, machine)]
    return record


def changes(options: Options, work: Work, machine: Machine) -> Iterator[Options]:
    """Options that would fit, the smallest change first: a smaller micro-batch; recomputed
    activations; an adapter; one over quantized weights; more devices."""
    recomputing = replace(options, gradient_checkpointing=True)
    adapter = replace(recomputing, rank=options.rank or LITERATURE_RANK)
    kinds = [options, recomputing, adapter]
    if options.gpus == 1 and quantizable(_trainer(options)):
        kinds.append(replace(adapter, quantize="nf4"))
    for kind in dict.fromkeys(kinds):
        if (fitting := _largest_batch(kind, work, machine)) is not None:
            yield fitting
    spread = replace(recomputing, quantize=None, optimizer="adamw")
    gpus = 2 * options.gpus
    while gpus <= MOST_DEVICES:
        if (fitting := _largest_batch(replace(spread, gpus=gpus), work, machine)) is not None:
            yield fitting
            return
        gpus *= 2


def _largest_batch(options: Options, work: Work, machine: Machine) -> Options | None:
    """The options with the largest micro-batch that fits, of halves of the given one, or None."""
    others = [record["total"] for record in _before_update(options, work)]
    size = options.batch_size
    while size:
        tried = replace(options, batch_size=size)
        if machine.fits(_total([*others, update_record(tried, work)["total"]], options.gpus)):
            return tried
        size //= 2
    return None
