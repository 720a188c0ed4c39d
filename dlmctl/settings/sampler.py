"""How completions are sampled, under the names of LLaDA's own generation code and Fast-dLLM's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob

Remasking = Literal["low_confidence", "random", "entropy", "margin", "sae"]
EosRule = Literal["normal", "late", "never"]
CacheRule = Literal["none", "prefix", "dual", "exact"]

SURE: tuple[Remasking, ...] = ("low_confidence", "margin")
"""Rules whose confidence says how sure the model is, between 0 and 1."""
BETWEEN_0_AND_1: tuple[Remasking, ...] = (*SURE, "random", "sae")
"""All rules whose confidence is between 0 and 1."""


@dataclass(frozen=True)
class Sampler:
    """Options of the sampler; lengths and steps that are None are the model's own."""

    PANEL: ClassVar[str] = "Sampler"

    gen_length: int | None = knob(
        None, "Tokens of a completion.", minimum=1, shown_default="the model's own, else 128"
    )
    block_length: int | None = knob(
        None,
        "Tokens of a block. Blocks are decided from left to right; the last may be shorter.",
        minimum=1,
        shown_default="the model's own, else 32",
    )
    steps: int | None = knob(
        None,
        "Denoising steps over all blocks; each decides equally many tokens, or with --threshold at "
        "least as many. Without --steps, a block takes as many as --threshold or --factor needs.",
        minimum=1,
        shown_default="the model's own, else --gen-length",
    )
    temperature: float = knob(0.0, "0 is greedy; above 0, exact Gumbel-max sampling.", minimum=0.0)
    cfg_scale: float = knob(
        0.0, "Classifier-free guidance, two passes a step; 0 is off.", minimum=0.0
    )
    remasking: Remasking = knob(
        "low_confidence",
        "Which tokens are masked again: how confidence is measured. sae is our own experiment: "
        "confidence times how little the features of --sae change.",
    )
    threshold: float | None = knob(
        None,
        "Parallel decoding as in Fast-dLLM: each step keeps every token with at least this "
        "confidence, and always the most confident one, until the block is done.",
        minimum=0.0,
        maximum=1.0,
        shown_default="off",
    )
    factor: float | None = knob(
        None,
        "Parallel decoding as in Fast-dLLM: each step keeps the n most confident tokens, at least "
        "one, for the largest n with (n + 1)(1 - confidence of the n-th) at most this; the last "
        "masked token of a block is decided with the others.",
        minimum=0.0,
        shown_default="off",
    )
    sub_block_length: int | None = knob(
        None,
        "Decide a block in parts of this many tokens, from left to right (the small block of "
        "Fast-dLLM v2).",
        minimum=1,
        shown_default="the model's own, else the block",
    )
    cache: CacheRule | None = knob(
        None,
        "Take keys and values from an earlier step. Of a block-causal model those of finished "
        "blocks never change (exact). Of others they do, so that it is an approximation: of the "
        "tokens before the block (prefix), or of all tokens outside it (dual).",
        shown_default="exact for a block-causal model, else none",
    )
    refresh: int | None = knob(
        None,
        "With --cache: steps between two passes over the whole sequence, which renew it.",
        minimum=1,
        shown_default="at each block's start",
    )
    refresh_below: float = knob(
        0.0,
        "With --cache: if the most confident token of a step is below this, renew the cache and "
        "take the step again.",
        minimum=0.0,
        maximum=1.0,
        shown_default="0, which is off",
    )
    eos: EosRule = knob(
        "normal",
        "End-of-sequence: like any token (normal); decided last in its block, and with it LLaDA's "
        "end of a turn (late); or not sampled at all (never).",
    )
    early_stop: bool = knob(
        False,
        "End a completion when a finished block contains end-of-sequence.",
        "--early-stop/--full-length",
    )
    compile: bool = knob(
        False,
        "Run the model through torch.compile: the same up to rounding, and faster once it is "
        "compiled, which takes half a minute.",
        "--compile",
    )

    def __post_init__(self) -> None:
        if self.threshold is not None and self.factor is not None:
            raise UsageError("--threshold and --factor are two rules for one thing: give one")
        if self.factor is not None and self.steps is not None:
            raise UsageError(
                "--steps is a fixed number of steps, and --factor takes as many as each block "
                "needs: leave one of them out"
            )
        if self.sub_block_length is not None and self.steps is not None:
            raise UsageError(
                "--steps is a fixed number of steps, and with --sub-block-length a block takes as "
                "many as its parts need: leave one of them out"
            )
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise UsageError(f"--threshold {self.threshold} is no confidence, from 0 to 1")
        if self.factor is not None and not self.factor >= 0:
            raise UsageError(f"--factor {self.factor} is not 0 or more")
        if self.refresh is not None and not self.approximate:
            raise UsageError("--refresh says how long a cache is used: give --cache too")
        if self.refresh_below > 0 and not self.approximate:
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
        if self.compile and self.cached:
            raise UsageError("--compile and --cache do not go together: leave one out")
        if self.cfg_scale > 0 and self.cached:
            raise UsageError("--cfg-scale and --cache do not go together: leave one out")

    @property
    def cached(self) -> bool:
        """Whether keys and values of an earlier step are used."""
        return self.cache not in (None, "none")

    @property
    def approximate(self) -> bool:
        """Whether they may be old."""
        return self.cache in ("prefix", "dual")

    @property
    def parallel(self) -> bool:
        """Whether the confidence says how many tokens a step decides."""
        return self.threshold is not None or self.factor is not None
