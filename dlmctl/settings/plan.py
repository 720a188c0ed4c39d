"""Options of `dlmctl plan` that `rollout` and `update` do not have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, same, same_field
from dlmctl.settings.compute import Compute, Quantization, Quantize, check_adapted
from dlmctl.settings.objective import Advantages
from dlmctl.settings.optimizer import Adapter, GradientCheckpointing, Method, Optimizer
from dlmctl.settings.parsing import byte_count

STEP, RUN, MACHINE = "What a step sees", "The run", "The machine"
MARGIN = 0.1
"""Share of a device's memory that is left to CUDA, its libraries and fragmentation."""


@dataclass(frozen=True)
class Options:
    """Options of `update` that its memory depends on."""

    model: str = knob(
        "builtin:puzzles",
        "Directory, checkpoint or hub name, of which only config.json is read; or the path of a "
        "config.json.",
        "-m",
        "--model",
        metavar="MODEL",
        env=True,
    )
    dtype: str = same_field("auto", Compute, "dtype")
    rank: int = same_field(0, Adapter, "rank")
    quantize: Quantization | None = same(None, Quantize)
    optimizer: Method = same_field("adamw", Optimizer, "optimizer")
    gradient_checkpointing: bool = same(False, GradientCheckpointing)
    batch_size: int = same_field(32, Compute, "batch_size")
    gpus: int = knob(
        1,
        "Devices: 'update' under torchrun with as many ranks, 'rollout' in as many --shard.",
        minimum=1,
        panel=MACHINE,
    )

    def __post_init__(self) -> None:
        check_adapted(self.quantize, self.rank)
        if self.gpus > 1 and not self.spreads:
            raise UsageError(
                "'dlmctl update' takes --quantize and --optimizer adamw-8bit in one process only: "
                "leave them out, or give --gpus 1"
            )

    @property
    def spreads(self) -> bool:
        """Whether several devices can train together with these options."""
        return self.quantize is None and self.optimizer == "adamw"

    def line(self) -> str:
        """These options as they are typed."""
        rank = f"--lora-rank {self.rank} " if self.rank else ""
        quantize = f"--quantize {self.quantize} " if self.quantize else ""
        optimizer = "" if self.optimizer == "adamw" else f"--optimizer {self.optimizer} "
        checkpointing = "--gradient-checkpointing " if self.gradient_checkpointing else ""
        places = f"--batch-size {self.batch_size} --gpus {self.gpus}"
        return f"{rank}{quantize}{optimizer}{checkpointing}{places}"


@dataclass(frozen=True)
class Step:
    """Sizes of a round of `rollout | verify | update`."""

    prompts_per_step: int = same_field(Advantages.prompts_per_step, Advantages, "prompts_per_step")
    completions: int = knob(
        8, "Completions for each prompt.", "-n", "--samples", minimum=1, panel=STEP
    )
    prompt_length: int = knob(128, "Tokens of a prompt.", minimum=1, panel=STEP)
    image_tokens: int = knob(
        0,
        "Tokens of a prompt's image, on top of these; Qwen2.5-VL has one for every 28 x 28 pixels.",
        minimum=0,
        panel=STEP,
    )
    rollout_batch_size: int = knob(
        64, "--batch-size of 'dlmctl rollout': sequences under way at a time.", minimum=1
    )


@dataclass(frozen=True)
class Run:
    """The whole run, for its time and cost."""

    PANEL: ClassVar[str] = RUN

    total_steps: int | None = knob(None, "Steps of the whole run.", minimum=1, shown_default="off")
    price: float | None = knob(
        None, "Price of a device for an hour, in any currency.", minimum=0.0, shown_default="off"
    )


@dataclass(frozen=True)
class Machine:
    """What is known of a device; None if it is not known."""

    PANEL: ClassVar[str] = MACHINE

    gpu_memory: str | None = knob(
        None,
        "Memory of a device, as 80G; a tenth of it is left free, for CUDA and fragmentation.",
        metavar="SIZE",
        shown_default="unknown",
    )
    bandwidth: float | None = knob(
        None,
        "10^9 bytes a second that a device receives from the others.",
        minimum=0.001,
        shown_default="unknown",
    )
    tflops: float | None = knob(
        None,
        "10^12 operations a second that one device was measured to do.",
        minimum=0.001,
        shown_default="unknown",
    )
    tokens_per_second: float | None = knob(
        None,
        "Tokens per second that 'dlmctl bench rollout' measured on one device, with these lengths "
        "and steps. Without --tflops, everything is taken to run at this speed.",
        minimum=0.001,
        shown_default="unknown",
    )

    measured: Path | None = knob(
        None,
        "Records of 'dlmctl bench gpu', which say how fast a device updates and samples, instead "
        "of --tflops and --tokens-per-second: operations a second, carried over to this model and "
        "sampler.",
        metavar="FILE",
        shown_default="none",
    )

    def __post_init__(self) -> None:
        self.memory  # noqa: B018 (raises)

    @cached_property
    def memory(self) -> int | None:
        """Bytes of a device.

        Raises:
            UsageError: --gpu-memory is not a size.
        """
        return None if self.gpu_memory is None else byte_count("--gpu-memory", self.gpu_memory)

    def fits(self, needed: float) -> bool:
        """Whether this many bytes fit into a device; only if its memory is known."""
        return needed <= (1 - MARGIN) * (self.memory or 0)
