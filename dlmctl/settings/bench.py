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
        "What to measure: exact, compiled, threshold, factor, prefix, dual, prefix+threshold, "
        "dual+threshold, dual+factor; of a block-causal model uncached, exact, compiled, "
        "threshold, factor.",
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
