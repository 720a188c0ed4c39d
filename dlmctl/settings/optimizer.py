"""How training steps are taken, and which weights they change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob

Schedule = Literal["constant", "cosine"]
Method = Literal["adamw", "adamw-8bit"]

OPTIMIZER, ADAPTER = "Optimizer", "Adapter and memory"

GradientCheckpointing = Annotated[
    bool,
    Knob(
        "Recompute activations in the backward pass: less memory, but gradients take half more "
        "time with an adapter, and a third more without. Leave it out if 'dlmctl plan' says that "
        "the run fits: in one process it begins by itself when a micro-batch does not fit.",
        "--gradient-checkpointing",
        panel=ADAPTER,
    ),
]


@dataclass(frozen=True)
class Optimizer:
    """The defaults are the common recipe of the d1 family."""

    PANEL: ClassVar[str] = OPTIMIZER

    rate: float = knob(3e-6, "Learning rate.", "--lr", minimum=0.0)
    warmup: int = knob(0, "Steps of linear warm-up.", minimum=0)
    schedule: Schedule = knob(
        "constant", "Learning rate after the warm-up; cosine needs --total-steps."
    )
    total_steps: int | None = knob(
        None, "Step at which the cosine reaches 0.", minimum=1, shown_default="off"
    )
    beta1: float = knob(0.9, "AdamW's first decay.", minimum=0.0, maximum=1.0)
    beta2: float = knob(0.99, "AdamW's second decay.", minimum=0.0, maximum=1.0)
    weight_decay: float = knob(0.1, "Decoupled, on matrices.", minimum=0.0)
    max_norm: float = knob(
        0.2, "Clip the gradient to this norm; 0 does not clip.", "--grad-norm", minimum=0.0
    )
    ema: float = knob(
        0.0,
        "Checkpoints have an exponential moving average of the weights with this decay, which is "
        "smaller in the first steps; 0 saves the weights themselves.",
        minimum=0.0,
        maximum=1.0,
    )
    optimizer: Method = knob(
        "adamw",
        "adamw-8bit keeps its moments in 8 bits, with a scale for 256 of them: a quarter of the "
        "memory of float32. Moments of parameters with less than 4096 values stay in float32.",
    )

    def __post_init__(self) -> None:
        if self.schedule == "cosine" and self.total_steps is None:
            raise UsageError("--schedule cosine needs --total-steps")


@dataclass(frozen=True)
class Adapter:
    """LoRA; rank 0 trains all weights."""

    PANEL: ClassVar[str] = ADAPTER

    rank: int = knob(
        0,
        "Train a LoRA adapter of this rank (128 in the literature); 0 trains all weights.",
        "--lora-rank",
        minimum=0,
    )
    alpha: float = knob(64.0, "Scale of the adapter.", "--lora-alpha", minimum=0.0)
    dropout: float = knob(
        0.0, "Dropout in the adapter.", "--lora-dropout", minimum=0.0, maximum=1.0
    )
