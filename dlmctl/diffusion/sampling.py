"""What a sampler is told, and what it answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.cache import reuses_keys
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.sampler import CacheRule, Sampler


@dataclass(frozen=True)
class SamplerConfig(Sampler):
    """Options of the sampler with their lengths known."""

    gen_length: int = 128
    block_length: int = 32
    steps: int | None = None
    """None: as many as it takes, at most one a token."""
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

    def quota(self) -> Tensor:
        """int64 [blocks, steps_per_block]: tokens to decide where their number is fixed."""
        last = self.gen_length - (self.blocks - 1) * self.block_length
        sizes = [self.block_length] * (self.blocks - 1) + [last]
        return torch.tensor([tokens_per_step(size, self.steps_per_block) for size in sizes])


def tokens_per_step(masked: int, steps: int) -> list[int]:
    """How many of `masked` tokens each step decides: as even as possible, the first ones more."""
    base, rest = divmod(masked, steps)
    return [base + (step < rest) for step in range(steps)]


def configured(policy: Policy, sampler: Sampler = Sampler()) -> SamplerConfig:
    """The options with lengths and steps that are None as the model has them, else LLaDA.

    With `threshold` or `factor` there are no steps.
    """
    values = asdict(sampler)
    usual = {"gen_length": 128, "block_length": 32, **policy.sampling}
    length = values["gen_length"] or usual["gen_length"]
    values["gen_length"] = length
    if policy.blocks is None:
        values["block_length"] = values["block_length"] or min(length, usual["block_length"])
        values["cache"] = values["cache"] or "none"
        if values["cache"] == "exact":
            raise UsageError(
                f"--cache exact is for block-causal models, and {policy.name} attends to the whole "
                "sequence: take prefix or dual, which are approximations"
            )
    else:
        _check_blocks(policy, sampler)
        values["block_length"] = policy.blocks.length
        plain = sampler.compile or sampler.cfg_scale > 0 or not reuses_keys(policy)
        values["cache"] = values["cache"] or ("none" if plain else "exact")
    if not sampler.parallel and sampler.steps is None and sampler.sub_block_length is None:
        usual_steps = None if sampler.gen_length else usual.get("steps")
        values["steps"] = usual_steps or (None if policy.blocks else length)
    return SamplerConfig(**values)


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
