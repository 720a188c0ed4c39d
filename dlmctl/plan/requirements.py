"""What a training run needs of its devices: memory by part, traffic, operations, time.

A step is a round of `rollout | verify | update`: completions are sampled, scored under policy and
reference as the algorithm asks, and one gradient is taken of them, or several. Its memory comes
from plan/footprint, its operations from plan/flops. With FSDP2 (train/sharding) every
pass of every micro-batch gathers the weights that it goes through; with N devices, W bytes of
weights and G of gradients:

    without gradient   gather W (N - 1) / N          received by each device
    with gradient      gather 2 W (N - 1) / N, and scatter G (N - 1) / N

Time is operations divided by what one device was measured to do, plus the traffic divided by the
bandwidth, as if neither hid the other.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.families import FAULTS
from dlmctl.models.policy import Policy
from dlmctl.models.weightless import weightless_policy
from dlmctl.plan.flops import Counts, counts, denoising, left_to_right
from dlmctl.plan.footprint import (
    Passing,
    gradient_memory,
    kept_memory,
    sampling_memory,
    scoring_memory,
    tower_memory,
    units,
)
from dlmctl.records.errors import DataError
from dlmctl.rl.policy_gradient import Passes
from dlmctl.settings.optimizer import Adapter
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.lora import add_adapter

MARGIN = 0.1
"""Share of a device's memory that is left to CUDA, its libraries and fragmentation."""
MOST_DEVICES = 1024


@dataclass(frozen=True)
class Work:
    """What a step does."""

    prompt_length: int
    """Tokens of a prompt, those of its image among them."""
    image_tokens: int
    samples: int
    """Completions of a prompt."""
    prompts: int
    """Of a step."""
    masks: int
    scored: float
    """Share of a completion's tokens that a mask has scored, on average."""
    passes: Passes
    contrasts: int
    """Passes of `advantage --algo srpo` over each completion; 0 without it."""
    sampling: SamplerConfig
    sampling_batch: int
    """Sequences that `rollout` has under way; 0 where nothing is sampled."""

    @property
    def completions(self) -> int:
        return self.prompts * self.samples

    @property
    def tokens(self) -> int:
        """Of all completions."""
        return self.completions * self.sampling.gen_length

    @property
    def length(self) -> int:
        return self.prompt_length + self.sampling.gen_length


@dataclass(frozen=True)
class Options:
    """Options of `update` that its memory depends on."""

    model: str
    dtype: torch.dtype
    lora_rank: int
    gradient_checkpointing: bool
    batch_size: int
    gpus: int

    def line(self) -> str:
        """As they are written."""
        rank = f"--lora-rank {self.lora_rank} " if self.lora_rank else ""
        again = "--gradient-checkpointing " if self.gradient_checkpointing else ""
        return f"{rank}{again}--batch-size {self.batch_size} --gpus {self.gpus}"


@dataclass(frozen=True)
class Machine:
    """What is known of the devices; None where it is not."""

    memory: int | None = None
    """Bytes of one."""
    bandwidth: float | None = None
    """Bytes a second that one receives from the others."""
    speed: float | None = None
    """Operations a second that one was measured to do."""
    tokens_per_second: float | None = None
    """Of `rollout` on one."""

    def holds(self, needed: float) -> bool:
        """Whether so many bytes fit into a device, of known memory."""
        return needed <= (1 - MARGIN) * (self.memory or 0)


def plan(options: Options, work: Work, machine: Machine) -> Iterator[dict[str, Any]]:
    """A record for each stage that has the model, and one for the whole step.

    Raises:
        DataError: the model cannot run, whatever its weights.
    """
    try:
        records = [*_before_update(options, work), update_record(options, work)]
    except FAULTS as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise DataError(f"no model of this shape can run ({reason})", options.model) from None
    if machine.tokens_per_second is not None and work.sampling_batch:
        found = records[0]["flops"] / work.tokens * machine.tokens_per_second
        machine = dataclasses.replace(machine, speed=machine.speed or found)
    for record in records:
        if machine.memory is not None:
            record["fits"] = machine.holds(record["total"])
        yield timed(record, machine, options.gpus, work)
    yield _step(records, options, work, machine)


def _before_update(options: Options, work: Work) -> list[dict[str, Any]]:
    """The other stages that have the model."""
    if not work.sampling_batch:
        return []
    policy, sampling = sampling_record(options, work)
    return [sampling, *([contrast_record(policy, options, work)] if work.contrasts else [])]


@functools.cache
def trainer(model: str, dtype: torch.dtype, lora_rank: int, recomputes: bool) -> Policy:
    """The weightless policy as `open_run` loads it."""
    policy = weightless_policy(model, dtype if lora_rank else torch.float32)
    if lora_rank:
        policy = add_adapter(policy, Adapter(lora_rank))
    if recomputes:
        checkpoint_activations(policy.core)
    return policy


def sampling_record(options: Options, work: Work) -> tuple[Policy, dict[str, Any]]:
    """`rollout`, which has the whole model on each device, and the policy that it has."""
    policy = weightless_policy(options.model, options.dtype)
    if options.lora_rank:
        policy = add_adapter(policy, Adapter(options.lora_rank))
    found = counts(policy, False)
    if policy.diffusion:
        each = denoising(found, work.sampling, work.prompt_length, policy.shift)
    else:
        each = left_to_right(found, work.sampling.gen_length, work.prompt_length)
    flops = work.completions * each + work.prompts * found.images(work.image_tokens, False)
    cached, passing = sampling_memory(
        policy, work.sampling, work.sampling_batch, work.prompt_length
    )
    weights = kept_memory(policy, 1).weights
    parts = {"weights": weights, "cache": round(cached), **_parts(passing)}
    return policy, _record("rollout", parts, weights + cached + passing.total, flops)


def contrast_record(policy: Policy, options: Options, work: Work) -> dict[str, Any]:
    """`advantage --algo srpo`: passes without gradient, in a process of its own."""
    found, scored = counts(policy, False), work.scored * work.sampling.gen_length
    flops = work.contrasts * work.completions * found.scoring(work.length, scored)
    flops += work.contrasts * work.prompts * found.images(work.image_tokens, False)
    passing = scoring_memory(
        policy, options.batch_size, work.length, work.sampling.gen_length, torch.float32
    )
    weights = kept_memory(policy, 1).weights
    parts = {"weights": weights, **_parts(passing)}
    return _record("advantage", parts, weights + passing.total, flops)


def update_record(options: Options, work: Work) -> dict[str, Any]:
    """`update` under torchrun with as many ranks as there are devices."""
    policy = trainer(
        options.model, options.dtype, options.lora_rank, options.gradient_checkpointing
    )
    kept = kept_memory(policy, options.gpus)
    copy = work.passes.reference and not options.lora_rank
    reference = kept.weights if copy else 0
    gathered = units(policy, options.gpus).gathered if options.gpus > 1 else 0
    passing = _training_passes(policy, options, work)
    parts = {
        **{name: getattr(kept, name) for name in ("weights", "gradients", "moments")},
        "reference": reference,
        "gathered": gathered,
        **_parts(passing),
        "working": kept.working,
    }
    stays = kept.weights + kept.gradients + kept.moments + reference
    total = stays + max(gathered + passing.total, kept.working)
    found = counts(policy, options.gradient_checkpointing)
    record = _record("update", parts, total, _update_flops(found, options, work))
    if options.gpus > 1:
        record |= traffic(policy, options, work)
    return record


def _training_passes(policy: Policy, options: Options, work: Work) -> Passing:
    """What a micro-batch needs, images among it."""
    rows = min(options.batch_size, work.completions * work.masks)
    passing = gradient_memory(policy, rows, work.length, work.sampling.gen_length, options.dtype)
    found = counts(policy, options.gradient_checkpointing)
    if found.tower is None or not work.image_tokens:
        return passing
    images = math.ceil(rows / work.samples)  # the samples of a prompt share its image
    patches = images * work.image_tokens * found.tower.per_token
    trained = found.tower.patches.trained > 0
    more = tower_memory(policy, patches, trained, options.dtype)
    return passing._replace(activations=passing.activations + more)


def _update_flops(found: Counts, options: Options, work: Work) -> float:
    scored, passes = work.scored * work.sampling.gen_length, work.passes
    plain = passes.policy + passes.reference
    rows = work.completions * work.masks
    images = math.ceil(rows / min(work.samples, options.batch_size))
    return rows * (
        plain * found.scoring(work.length, scored)
        + passes.gradient * found.gradient(work.length, scored)
    ) + images * (
        plain * found.images(work.image_tokens, False)
        + passes.gradient * found.images(work.image_tokens, True)
    )


def traffic(policy: Policy, options: Options, work: Work) -> dict[str, Any]:
    """Micro-batches of a rank, and bytes that it receives in a step."""
    made, passes = units(policy, options.gpus), work.passes
    weights, gradients = made.root + sum(made.blocks), made.root_gradients + sum(made.gradients)
    rows = work.completions * work.masks
    batches = math.ceil(rows / (options.gpus * options.batch_size))
    share = (options.gpus - 1) / options.gpus
    gathers = passes.policy + passes.reference + 2 * passes.gradient
    return {
        "micro_batches": batches,
        "gather": round(batches * gathers * weights * share),
        "scatter": round(batches * passes.gradient * gradients * share),
    }


def timed(record: dict[str, Any], machine: Machine, gpus: int, work: Work) -> dict[str, Any]:
    """With the seconds that it takes, where what they depend on is known."""
    moved = record.get("gather", 0) + record.get("scatter", 0)
    if moved and machine.bandwidth is not None:
        record["traffic_seconds"] = moved / machine.bandwidth
    if machine.speed is not None:
        record["compute_seconds"] = record["flops"] / machine.speed / gpus
        if record["stage"] == "rollout" and machine.tokens_per_second is not None:
            record["compute_seconds"] = work.tokens / machine.tokens_per_second / gpus
        if not moved or machine.bandwidth is not None:
            record["seconds"] = record["compute_seconds"] + record.get("traffic_seconds", 0.0)
    return record


def _parts(passing: Passing) -> dict[str, int]:
    return {name: round(value) for name, value in passing._asdict().items()}


def _record(stage: str, parts: dict[str, int], total: float, flops: float) -> dict[str, Any]:
    return {"stage": stage, **parts, "total": round(total), "flops": round(flops)}


def _step(
    records: list[dict[str, Any]], options: Options, work: Work, machine: Machine
) -> dict[str, Any]:
    """The stages together; on one device, as a pipe, they are there at the same time."""
    totals = [record["total"] for record in records]
    total = sum(totals) if options.gpus == 1 else max(totals)
    policy = trainer(
        options.model, options.dtype, options.lora_rank, options.gradient_checkpointing
    )
    trained = sum(p.numel() for p in policy.model.parameters() if p.requires_grad)
    record: dict[str, Any] = {
        "stage": "step",
        "model": options.model,
        "options": options.line(),
        "parameters": sum(p.numel() for p in policy.model.parameters()),
        "trained": trained,
        "completions": work.completions,
        "tokens": work.tokens,
        "total": total,
        **({} if machine.memory is None else {"fits": machine.holds(total)}),
        "flops": sum(record["flops"] for record in records),
    }
    if all("seconds" in one for one in records):
        seconds = sum(one["seconds"] for one in records)
        record |= {"seconds": seconds, "tokens_per_second": work.tokens / seconds}
        record["tflops"] = record["flops"] / seconds / options.gpus / 1e12
    if not record.get("fits", True):
        record["changes"] = [change.line() for change in changes(options, work, machine)]
    return record


def changes(options: Options, work: Work, machine: Machine) -> Iterator[Options]:
    """Options that would fit, the least change first: a smaller micro-batch; activations made
    again; an adapter; more devices."""
    again = dataclasses.replace(options, gradient_checkpointing=True)
    adapter = dataclasses.replace(again, lora_rank=options.lora_rank or 128)
    kinds = [options, *([again] if again != options else [])]
    kinds += [adapter] if adapter != again else []
    for kind in kinds:
        if (found := _largest_batch(kind, work, machine)) is not None:
            yield found
    gpus = 2 * options.gpus
    while gpus <= MOST_DEVICES:
        wider = dataclasses.replace(again, gpus=gpus)
        if (found := _largest_batch(wider, work, machine)) is not None:
            yield found
            return
        gpus *= 2


def _largest_batch(options: Options, work: Work, machine: Machine) -> Options | None:
    """With the largest micro-batch, of halves of the one given, that fits; None where none does."""
    others = [record["total"] for record in _before_update(options, work)]
    size = options.batch_size
    while size:
        tried = dataclasses.replace(options, batch_size=size)
        totals = [*others, update_record(tried, work)["total"]]
        if machine.holds(sum(totals) if options.gpus == 1 else max(totals)):
            return tried
        size //= 2
    return None
