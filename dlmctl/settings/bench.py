"""What `dlmctl bench` measures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob, same, same_field
from dlmctl.settings.compute import Seed
from dlmctl.settings.optimizer import Adapter
from dlmctl.settings.sampler import SAMPLED, Sampler

BenchModel = Annotated[
    str,
    Knob(
        "random:100m or random:8b, random weights in the shape of LLaDA; or any model.",
        "-m",
        "--model",
        metavar="MODEL",
    ),
]


@dataclass(frozen=True)
class Workload:
    """Rounds of training, all alike."""

    task: str = knob("sudoku", "Prompts, as in 'dlmctl rollout'.")
    rounds: int = knob(20, "Rounds; the first is not timed.", minimum=3)
    prompts: int = knob(32, "Prompts in a round.", minimum=1)
    samples: int = knob(8, "Completions for each prompt.", "-n", "--samples", minimum=2)
    seed: int = same(0, Seed)


@dataclass(frozen=True)
class SamplerPaths:
    """Paths of the sampler, and the prompts that they are compared on."""

    paths: str | None = knob(
        None,
        "What to measure: exact, compiled, random (order), threshold, factor, prefix, dual, "
        "prefix+threshold, dual+threshold, dual+factor; of a block-causal model uncached, exact, "
        "compiled, random, threshold, factor.",
        metavar="NAMES",
        shown_default="exact,dual,dual+threshold,dual+factor; uncached,exact,threshold",
    )
    reference: int = knob(
        2,
        "Prompts that LLaDA's plain sampler runs on, one at a time; a block-causal model has none.",
        minimum=0,
    )
    prompts: int = knob(16, "Random prompts, without a FILE.", minimum=1)
    prompt_lengths: str = knob("64-256", "Their lengths, evenly spread.", metavar="FROM-TO")
    gen_length: int | None = same_field(SAMPLED.gen_length, Sampler, "gen_length")
    block_length: int | None = same_field(SAMPLED.block_length, Sampler, "block_length")
    steps: int | None = same_field(SAMPLED.steps, Sampler, "steps")
    temperature: float = same_field(SAMPLED.temperature, Sampler, "temperature")
    threshold: float = knob(0.9, "Threshold of the paths that name it.")
    factor: float = knob(1.0, "Factor of the paths that name it.")
    refresh: int | None = same_field(SAMPLED.refresh, Sampler, "refresh")
    refresh_below: float = same_field(SAMPLED.refresh_below, Sampler, "refresh_below")

    @property
    def exact(self) -> Sampler:
        """The sampler that the paths approximate."""
        return Sampler(
            self.gen_length,
            self.block_length,
            self.steps,
            self.temperature,
            schedule="even",
            remasking="low_confidence",
            confidence_of="model",
        )

    @property
    def lengths(self) -> tuple[int, int]:
        """Shortest and longest random prompt.

        Raises:
            UsageError: --prompt-lengths is not a range.
        """
        first, _, last = self.prompt_lengths.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
            raise UsageError(
                f"--prompt-lengths {self.prompt_lengths} is not FROM-TO, two numbers of tokens"
            )
        return int(first), int(last)


@dataclass(frozen=True)
class GradientStep:
    """One RSPO gradient on random completions of one random prompt."""

    gen_length: int = knob(512, "Tokens of a completion.", minimum=1)
    prompt_length: int = knob(128, "Tokens of the prompt.", minimum=1)
    completions: int = knob(2, "Completions in the group.", "-n", "--completions", minimum=2)
    masks: int = knob(4, "Masks for each completion.", "-k", "--masks-per-sample", minimum=1)
    rank: int = same_field(0, Adapter, "rank")
    gradient_checkpointing: bool = knob(
        False,
        "Recompute activations in the backward pass, of both implementations.",
        "--gradient-checkpointing",
    )
    batch_sizes: str = knob(
        "4,1",
        "Sequences in a pass of 'dlmctl update'; a row for each number.",
        "--batch-size",
        metavar="SIZES",
    )
    repeats: int = knob(2, "Runs; the fastest counts.", minimum=1)
    seed: int = same(0, Seed)


PARTS = ("rollout", "compile", "scoring", "update", "sae", "neighbours")
"""Parts of `bench gpu`, in the order in which they are measured."""


@dataclass(frozen=True)
class DeviceWork:
    """What `bench gpu` does; the defaults are the sizes of d1 and its successors."""

    parts: str = knob(",".join(PARTS), f"What to measure, of {', '.join(PARTS)}.", metavar="NAMES")
    seconds: float = knob(
        540.0,
        "Time for all of it, loading aside, of which sampling takes 0.7 at most. What no longer "
        "fits is left out, and its record says so.",
        minimum=0.0,
    )
    prompt_length: int = same_field(128, GradientStep, "prompt_length")
    gen_length: int = same_field(256, GradientStep, "gen_length")
    block_length: int = knob(32, "Tokens of a block.", minimum=1)
    steps: int = knob(128, "Denoising steps over all blocks.", minimum=1)
    threshold: float = same_field(0.9, SamplerPaths, "threshold")
    batch_sizes: str = knob(
        "1,64", "Completions that are sampled at a time.", "--batch-size", metavar="SIZES"
    )
    completions: int = same_field(6, GradientStep, "completions")
    masks: int = same_field(4, GradientStep, "masks")
    rank: int = knob(128, "Rank of the adapter that is trained.", "--lora-rank", minimum=1)
    micro_batch: int = knob(
        8,
        "Sequences in a pass of scoring and 'dlmctl update'.",
        "--update-batch-size",
        minimum=1,
    )
    latents: int | None = knob(
        None,
        "Latents of the autoencoder.",
        minimum=1,
        shown_default="four for each dimension of the model, 16,384 at most",
    )
    vectors: int | None = knob(
        None,
        "Vectors of 3,072 numbers whose neighbours are sought, among as many.",
        minimum=16,
        shown_default="50,000 on CUDA, else 2,000",
    )
    seed: int = same(0, Seed)

    def __post_init__(self) -> None:
        blocks = -(-self.gen_length // self.block_length)
        if self.block_length > self.gen_length:
            raise UsageError(
                f"--block-length {self.block_length} is more than --gen-length {self.gen_length}"
            )
        if self.steps < blocks:
            raise UsageError(
                f"--steps {self.steps} is less than one step for each of the {blocks} blocks"
            )

    @property
    def chosen(self) -> list[str]:
        """The parts to measure.

        Raises:
            UsageError: --parts has something else.
        """
        names = self.parts.split(",")
        for name in names:
            if name not in PARTS:
                raise UsageError(f"--parts has no '{name}'; there are: {', '.join(PARTS)}")
        return [name for name in PARTS if name in names]

    @property
    def block(self) -> Sampler:
        """The sampler of a completion's last block."""
        blocks = -(-self.gen_length // self.block_length)
        return Sampler(self.block_length, self.block_length, self.steps // blocks)

    @property
    def before(self) -> int:
        """Tokens before that block."""
        return self.prompt_length + self.gen_length - self.block_length
