"""What a sampler is told, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record

Remasking = Literal["low_confidence", "random", "entropy", "margin", "sae"]
EosRule = Literal["normal", "late", "never"]
CacheRule = Literal["none", "prefix", "dual"]

SURE: tuple[Remasking, ...] = ("low_confidence", "margin")
"""Rules whose confidence says how sure the model is, between 0 and 1."""
BETWEEN_0_AND_1: tuple[Remasking, ...] = (*SURE, "random", "sae")
"""All rules whose confidence is between 0 and 1."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler; the names are LLaDA's and, for what is faster, Fast-dLLM's."""

    gen_length: int = 128
    """Tokens of the completion."""
    block_length: int = 32
    """Tokens of a block; the last block may be shorter."""
    steps: int | None = None
    """Denoising steps over all blocks; None: as many as it takes, at most one a token."""
    temperature: float = 0.0
    cfg_scale: float = 0.0
    """Classifier-free guidance; 0 is off."""
    remasking: Remasking = "low_confidence"
    threshold: float | None = None
    """Keep every token with at least this confidence; None keeps a fixed number per step."""
    factor: float | None = None
    """Keep the n surest tokens, n as large as (n + 1) (1 - confidence of the n-th) <= this, and
    the last masked token of a block along with the others."""
    cache: CacheRule = "none"
    """Keys and values that a step takes from an earlier one: of none, of the tokens before the
    block (prefix), or of all tokens outside the block (dual)."""
    refresh: int | None = None
    """Steps from one pass over the whole sequence to the next; None: at each block's start only."""
    refresh_below: float = 0.0
    """With a cache: where the surest token of a step is less sure than this, nothing is decided and
    the row passes over its whole sequence, in the same step."""
    eos: EosRule = "normal"
    """late: end-of-sequence is decided last in its block; never: it is not sampled at all."""
    early_stop: bool = False
    """End a row when a finished block holds end-of-sequence; the rest is filled with it."""
    compile: bool = False
    """Run the model through torch.compile."""

    def __post_init__(self) -> None:
        if min(self.gen_length, self.block_length) < 1:
            raise UsageError("--gen-length and --block-length are at least 1")
        if self.steps is not None and self.steps < self.blocks:
            raise UsageError(
                f"--steps {self.steps} is less than one step for each of the {self.blocks} blocks "
                f"(--gen-length {self.gen_length} / --block-length {self.block_length})"
            )
        if self.threshold is not None and self.factor is not None:
            raise UsageError("--threshold and --factor are two rules for one thing: give one")
        if self.parallel and self.steps is not None:
            rule = "--threshold" if self.factor is None else "--factor"
            raise UsageError(
                f"--steps is a fixed number of steps, and {rule} takes as many as each block "
                f"needs: leave one of them out"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} is no confidence, from 0 to 1")
        if self.factor is not None and not self.factor >= 0:
            raise UsageError(f"--factor {self.factor} is not 0 or more")
        if self.refresh is not None and self.cache == "none":
            raise UsageError("--refresh says how long a cache is used: give --cache too")
        if self.refresh_below > 0 and self.cache == "none":
            raise UsageError("--refresh-below says when a cache is too old: give --cache too")
        for option, given, rules in (
            ("--threshold", self.threshold is not None, BETWEEN_0_AND_1),
            ("--factor", self.factor is not None, BETWEEN_0_AND_1),
            ("--refresh-below", self.refresh_below > 0, SURE),
        ):
            if given and self.remasking not in rules:
                raise UsageError(
                    f"{option} compares a confidence between 0 and 1, and that of --remasking "
                    f"{self.remasking} is none: take {' or '.join(rules)}"
                )
        if self.compile and self.cache != "none":
            raise UsageError("--compile and --cache do not go together: leave one out")
        if self.cfg_scale > 0 and self.cache != "none":
            raise UsageError("--cfg-scale and --cache do not go together: leave one out")

    @property
    def blocks(self) -> int:
        return -(-self.gen_length // self.block_length)

    @property
    def parallel(self) -> bool:
        """Whether the confidence says how many tokens a step decides."""
        return self.threshold is not None or self.factor is not None

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


def settings_for(policy: Policy, **given: Any) -> Sampling:
    """Settings as given; lengths and steps that are None are the model's own, else LLaDA's.

    With `threshold` or `factor` there are no steps but those given, which are refused.
    """
    own = {key: value for key, value in given.items() if value is not None}
    gen_length = own.get("gen_length", policy.sampling.get("gen_length", 128))
    lengths = {
        "gen_length": gen_length,
        "block_length": min(gen_length, policy.sampling.get("block_length", 32)),
    }
    if not own.keys() & {"threshold", "factor"}:
        steps = gen_length if "gen_length" in own else policy.sampling.get("steps", gen_length)
        lengths["steps"] = steps
    return Sampling(**{**lengths, **own})


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
