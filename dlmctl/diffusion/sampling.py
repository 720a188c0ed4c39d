"""What a sampler is told, and what it answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import (
    BETWEEN_0_AND_1,
    SURE,
    CacheRule,
    Distribution,
    EosRule,
    Remasking,
    Sampler,
    Schedule,
)

BOUNDS = ("threshold", "factor", "edit_threshold", "edit_steps")
"""Options that are not off at 0."""

LAST_TIME = 1e-3
"""Time at the end of the last step, which Dream's code calls eps."""


@dataclass(frozen=True)
class SamplerConfig(Sampler):
    """Options of the sampler, all known; the defaults are LLaDA's."""

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    """None: as many as it takes, at most one a token."""
    top_p: float = 1.0
    top_k: int = 0
    cfg_scale: float = 0.0
    schedule: Schedule = "even"
    remasking: Remasking = "low_confidence"
    confidence_of: Distribution = "model"
    alg_temp: float = 0.0
    edit_threshold: float = 1.0
    edit_steps: int = 16
    eos: EosRule = "normal"
    early_stop: bool = False
    cache: CacheRule = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.gen_length, self.block_length) < 1:
            raise UsageError("--gen-length and --block-length are at least 1")
        if self.steps is not None and self.steps < self.blocks:
            raise UsageError(
                f"--steps {self.steps} is less than one step for each of the {self.blocks} blocks "
                f"(--gen-length {self.gen_length} / --block-length {self.block_length})"
            )

    @property
    def blocks(self) -> int:
        return -(-self.gen_length // self.block_length)

    @property
    def steps_per_block(self) -> int:
        """The most that a block takes."""
        return self.block_length if self.steps is None else self.steps // self.blocks

    @property
    def ancestral(self) -> bool:
        """Whether each masked token is decided independently of the others."""
        return self.schedule == "timesteps" and self.remasking == "random"

    @property
    def blind(self) -> bool:
        """Whether which tokens stay does not depend on what is predicted."""
        return self.remasking == "random" and self.eos != "late" and not self.editing

    @property
    def idles(self) -> bool:
        """Whether steps that decide nothing are left out: what later steps see is the same.

        Not if a pass may renew a cache, nor with `sae`, which compares each step with the last.
        """
        fixed = self.schedule == "timesteps" and not self.ancestral
        return fixed and not self.cached and self.remasking != "sae"

    def quota(self) -> Tensor:
        """[blocks, steps_per_block]: `per_step` of each block."""
        last = self.gen_length - (self.blocks - 1) * self.block_length
        sizes = [self.block_length] * (self.blocks - 1) + [last]
        return torch.tensor([self.per_step(size) for size in sizes])

    def per_step(self, masked: int) -> Sequence[float]:
        """How many of `masked` tokens each step of a block decides if their number is fixed.

        With ancestral sampling it is the probability of each masked token instead.
        """
        steps = self.steps_per_block
        if self.ancestral:
            shares: list[float] = unmasking_probabilities(steps).tolist()
            return shares
        return SPREAD[self.schedule](masked, steps)

    def used(self, diffusion: bool = True) -> dict[str, Any]:
        """What records say of the sampler, temperature aside: the options that are not off."""
        unscheduled = self.parallel and self.steps is None
        off = {"top_p": 1.0, "schedule": self.schedule if unscheduled else None}
        if not self.editing:
            off |= {"edit_threshold": self.edit_threshold, "edit_steps": self.edit_steps}
        return {
            name: value
            for name, value in asdict(self).items()
            if value not in (None, off.get(name))
            and (value not in (False, "none") or name in BOUNDS)
            and name != "temperature"
            and (diffusion or name in ("gen_length", "top_p", "top_k"))
        }


@functools.cache
def tokens_per_step(masked: int, steps: int) -> list[int]:
    """How many of `masked` tokens each step decides: as even as possible, the first ones more."""
    base, rest = divmod(masked, steps)
    return [base + (step < rest) for step in range(steps)]


@functools.cache
def tokens_per_timestep(masked: int, steps: int) -> list[int]:
    """How many of `masked` tokens each step decides in Dream's `diffusion_generate`.

    A step from time t to s decides int(m (1 - s/t)) of the m tokens that are masked before it, and
    the last step all. It rounds as theirs, in float32: for more than 512 steps this matters.
    """
    *shares, _ = unmasking_probabilities(steps)
    left, numbers = torch.tensor(float(masked)), []
    for share in shares:
        numbers.append(int(left * share))
        left = left - numbers[-1]
    return [*numbers, int(left)]


@functools.cache
def tokens_by_rounding(masked: int, steps: int) -> list[int]:
    """How many of `masked` tokens each step decides in dllm's samplers.

    A step from time t to s decides m (1 - s/t) of the m tokens that are masked before it, rounded
    half to even, as time falls evenly from 1 to 0. As theirs, s/t is in float32 and the rest in
    float64, and steps that would decide nothing come last.
    """
    left, numbers = masked, []
    for step in range(steps, 0, -1):
        s, t = torch.tensor([(step - 1) / steps, step / steps], dtype=torch.float32)
        share = 1 - ((1 - (1 - s)) / (1 - (1 - t))).item()
        numbers.append(min(round(left * share), left))
        left -= numbers[-1]
    deciding = [number for number in numbers if number]
    return deciding + [0] * (steps - len(deciding))


@functools.cache
def unmasking_probabilities(steps: int) -> Tensor:
    """Probability that a masked token is decided in each step from time t to s, float32 [steps].

    It is 1 - s/t, that of the reverse process if a token is masked with probability t (MDLM, arXiv
    2406.07524, equation 7). Times fall evenly from 1; the last step decides what is left.
    """
    times = torch.linspace(1, LAST_TIME, steps + 1)
    shares = 1 - times[1:] / times[:-1]
    shares[-1] = 1
    return shares


SPREAD: Mapping[Schedule, Callable[[int, int], list[int]]] = {
    "even": tokens_per_step,
    "timesteps": tokens_per_timestep,
    "rounded": tokens_by_rounding,
}


def configured(policy: Policy, sampler: Sampler = Sampler()) -> SamplerConfig:
    """The options, with those that are None as the model has them, else LLaDA.

    What the model has for itself gives way where it contradicts an option: its steps to a given
    length or threshold, its threshold to a given schedule, its remasking to a threshold that cannot
    be compared with it, its alg_temp to remasking without confidence.
    """
    given = {name: value for name, value in asdict(sampler).items() if value is not None}
    own = dict(policy.sampling)
    # 1. Lengths; a block length of None is the whole length.
    values: dict[str, Any] = {"gen_length": own.pop("gen_length", 128), **given}
    length, block = values["gen_length"], own.pop("block_length", 32)
    if policy.blocks is None:
        values.setdefault("block_length", length if block is None else min(length, block))
    else:
        _check_blocks(policy, sampler)
        values["block_length"] = policy.blocks.length
    # 2. How many tokens a step decides.
    values |= _progress(policy, sampler, own, length, values["block_length"])
    # 3. Which tokens: by a confidence that goes with that.
    if sampler.remasking not in (None, *SURE):
        own.pop("edit_threshold", None)
    values = {**own, **values}
    sure = sampler.refresh_below > 0 or values.get("edit_threshold", 1) < 1
    compared = sure or {"threshold", "factor"} & values.keys()
    rules = SURE if sure or sampler.alg_temp else BETWEEN_0_AND_1
    if sampler.remasking is None and (compared or sampler.alg_temp):
        usual = values.get("remasking", "low_confidence")
        fits = usual in rules or (usual != "random" and not compared)
        values["remasking"] = usual if fits else "low_confidence"
    if sampler.remasking == "random":
        values["alg_temp"] = sampler.alg_temp or 0.0
    # 4. Whether keys and values are reused.
    if sampler.cached:
        values["cfg_scale"] = sampler.cfg_scale or 0.0
    if policy.blocks is not None and "cache" not in given:
        plain = values.get("cfg_scale", 0) > 0 or not policy.reuses_keys
        values["cache"] = "none" if plain else "exact"
    if policy.blocks is None and sampler.cache == "exact":
        raise UsageError(
            f"--cache exact is for block-causal models, and {policy.name} attends to the whole "
            "sequence: take prefix or dual, which are approximations"
        )
    config = SamplerConfig(**values)
    if policy.latent_masks and config.cached:
        raise UsageError(
            f"--cache {config.cache}: {policy.name} has another mask token in each step, so that "
            "nothing can be reused: leave it out"
        )
    _check_editing(policy, sampler, config)
    return config


def _check_editing(policy: Policy, sampler: Sampler, config: SamplerConfig) -> None:
    """Raise UsageError if decided tokens cannot be edited, or are not and it is said how."""
    if config.editing and policy.blocks is None:
        raise UsageError(
            "--edit-threshold is for block-causal models, whose finished blocks do not change, and "
            f"{policy.name} is not one: leave it out"
        )
    if sampler.edit_steps is not None and not config.editing:
        raise UsageError("--edit-steps is how long tokens are edited: give --edit-threshold too")


def _progress(
    policy: Policy, sampler: Sampler, own: dict[str, Any], length: int, block_length: int
) -> dict[str, Any]:
    """The number of steps, if there is one; what contradicts the options is taken out of `own`."""
    unbounded = sampler.remasking is not None and sampler.remasking not in BETWEEN_0_AND_1
    if unbounded or sampler.alg_temp or sampler.schedule is not None or sampler.parallel:
        own.pop("threshold", None)
        own.pop("factor", None)
    if sampler.schedule == "timesteps":
        own.pop("sub_block_length", None)
    steps = own.pop("steps", None)
    if sampler.steps is not None:
        own.pop("factor", None)
        own.pop("sub_block_length", None)
    by_parts = sampler.sub_block_length is not None or "sub_block_length" in own
    bounded = sampler.parallel or bool({"threshold", "factor"} & own.keys())
    if bounded:
        own.pop("alg_temp", None)
    if bounded or by_parts or (policy.blocks and own.get("schedule") == "timesteps"):
        own.pop("schedule", None)
    if sampler.steps is not None:
        return {}
    if sampler.parallel or by_parts or "factor" in own:
        return {}
    if steps is not None and sampler.gen_length is None:
        return {"steps": max(steps, -(-length // block_length))}
    return {} if policy.blocks is not None or "threshold" in own else {"steps": length}


def _check_blocks(policy: Policy, sampler: Sampler) -> None:
    """Raise UsageError for what a block-causal model cannot do."""
    assert policy.blocks is not None
    length = policy.blocks.length
    if sampler.block_length not in (None, length):
        raise UsageError(
            f"{policy.name} attends in blocks of {length} tokens, which --block-length "
            f"{sampler.block_length} does not change; if they are longer or shorter, write "
            f"MODEL,block_length={sampler.block_length}"
        )
    if sampler.schedule == "timesteps":
        raise UsageError(
            f"--schedule timesteps is for models that attend to the whole sequence, and "
            f"{policy.name} is block-causal: leave it out"
        )
    if sampler.approximate:
        raise UsageError(
            f"--cache {sampler.cache} is an approximation, and {policy.name} is block-causal: "
            "take exact, the default"
        )


class Request(NamedTuple):
    """A completion to be made."""

    prompt: list[int]
    key: int
    """64-bit key that its noise comes from."""
    record: Record | None = None
    """The record it was made of, for callbacks."""


class Sample(NamedTuple):
    """One completion."""

    tokens: list[int]
    """All `gen_length` ids, those after the first end-of-sequence included."""
    order: list[int]
    """Step, counted from 0 over all blocks, at which each token was decided."""
    nfe: int
    """Forward passes that the row took part in."""
    log_probs: list[float] | None = None
    """Of each token in nats, at temperature 1, where the sampler has them exactly."""
    edits: int | None = None
    """How often a token was replaced after it was decided; None without editing."""
    engine: str | None = None
    """Name and version of the inference server that sampled it; None: dlmctl did."""
