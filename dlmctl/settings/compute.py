"""What runs, and where: model, device, batch size, seed, memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob, same

Seed = Annotated[int, Knob("Same seed, same input: same output.", "--seed", env=True)]


Model = Annotated[
    str,
    Knob(
        "Hub name, directory or checkpoint; builtin:puzzles is the model that dlmctl ships.",
        "-m",
        "--model",
        metavar="MODEL",
        env=True,
    ),
]


DeviceName = Annotated[
    str, Knob("auto, cpu, cuda or cuda:N.", "--device", metavar="DEVICE", env=True)
]


Memory = Annotated[
    str,
    Knob(
        "Memory for blocks of distances, as 512M or 4G; changes speed, not results.",
        "--memory",
        metavar="SIZE",
        env=True,
    ),
]


Quantization = Literal["nf4"]
"""Formats of quantized weights."""

Quantize = Annotated[
    Quantization | None,
    Knob(
        "Keep the linear layers of the blocks in this format, frozen: nf4 takes 4.5 bits a weight "
        "(QLoRA). 'dlmctl update' trains an adapter over them (--lora-rank), which fits the whole "
        "weights, too.",
        "--quantize",
        shown_default="off",
    ),
]


def check_adapted(quantize: Quantization | None, rank: int) -> None:
    """Raise UsageError if quantized weights are to be trained without an adapter."""
    if quantize and not rank:
        raise UsageError(
            f"--quantize {quantize} freezes the weights: give --lora-rank too, to train an adapter"
        )


@dataclass(frozen=True)
class Device:
    """Where a model runs."""

    device: str = same("auto", DeviceName)
    dtype: str = knob(
        "auto",
        "auto (bfloat16 on CUDA, float32 elsewhere), float32, bfloat16, or float16, which 'update' "
        "and 'distill masked' refuse.",
        metavar="DTYPE",
        env=True,
    )


@dataclass(frozen=True)
class Compute(Device):
    """Where a model runs, and on how much at a time."""

    batch_size: int = knob(
        32,
        "Sequences per forward pass; changes speed and memory, not results.",
        "-b",
        "--batch-size",
        minimum=1,
        env=True,
    )


@dataclass(frozen=True)
class QuantizedCompute(Compute):
    """The same for a model whose weights may be quantized."""

    quantize: Quantization | None = same(None, Quantize)
