"""Sets of images, the networks that are trained on them, and how they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob, same, same_field
from dlmctl.settings.compute import Seed
from dlmctl.settings.optimizer import OPTIMIZER, Optimizer, Schedule
from dlmctl.settings.training import Log

NetworkKind = Literal["unet", "mlp"]
Dtype = Literal["float32", "bfloat16"]
ADDED = ("dropout", "flip", "dtype")
"""Fields of `Training` that its first version did not have."""
NETWORK, NOISE, FILES = "Network", "Noise", "Image files"

Images = Annotated[
    str,
    Knob(
        "builtin:digits, a folder of images, a safetensors file (bytes, or floats in [-1, 1] or "
        "[0, 1]), or a file or data set with a column of images. The suffix @SPLIT or "
        "@CONFIG/SPLIT takes a part of a data set that is not train, as in uoft-cs/cifar10@test; "
        "after it, #A:B takes the images from A up to B.",
        metavar="IMAGES",
        argument=True,
    ),
]
Run = Annotated[
    Path,
    Knob(
        "Directory of the run: its checkpoints, the link 'latest', metrics.jsonl.",
        "-o",
        "--output",
        metavar="RUN",
    ),
]


@dataclass(frozen=True)
class ImageReading:
    """What is done with encoded images, of files and of data sets, in this order: resize, crop,
    gray. Tensors are taken as they are."""

    PANEL: ClassVar[str] = FILES

    resize: int | None = knob(
        None,
        "Reduce image files, and images of data sets, to this many pixels on the shorter side, by "
        "Pillow's bicubic filter, which is antialiased. Smaller ones are refused.",
        metavar="N",
        minimum=1,
        shown_default="off",
    )
    crop: int | None = knob(
        None,
        "Then keep N x N pixels in the middle.",
        metavar="N",
        minimum=1,
        shown_default="off",
    )
    gray: bool = knob(False, "Then take their luminance.", "--gray")

    def __post_init__(self) -> None:
        if self.resize and self.crop and self.crop > self.resize:
            raise UsageError(f"--crop {self.crop} is more than --resize {self.resize} leaves")

    def recorded(self) -> dict[str, Any]:
        """What a run records of it; --resize and --crop if they are given."""
        sides = {"resize": self.resize, "crop": self.crop}
        return {"gray": self.gray, **{name: side for name, side in sides.items() if side}}


def reading_options(about: Mapping[str, Any]) -> str:
    """What a run recorded of its reading, as options; empty if there were none."""
    sides = [f"--{name} {about[name]}" for name in ("resize", "crop") if about.get(name)]
    return " ".join([*sides, *(["--gray"] if about.get("gray") else [])])


@dataclass(frozen=True)
class NetworkSizes:
    """The network as the command line describes it; None is the default of its kind."""

    PANEL: ClassVar[str] = NETWORK

    kind: NetworkKind | None = knob(
        None,
        "A U-Net, or a residual MLP on the flattened input.",
        "--network",
        shown_default="unet for images from 16x16 on, else mlp",
    )
    width: int | None = knob(
        None,
        "Channels of the finest level; for an mlp, hidden units.",
        minimum=4,
        shown_default="32, for an mlp 256",
    )
    multipliers: str | None = knob(
        None,
        "Channels of each level as multiples of the width; each level halves the resolution.",
        metavar="M,…",
        shown_default="1,2,2",
    )
    blocks: int | None = knob(
        None,
        "Residual blocks per level and direction; for an mlp, in all.",
        minimum=1,
        shown_default="2",
    )
    attention: str | None = knob(
        None,
        "Levels with self-attention; 1 is the finest.",
        metavar="LEVEL,…",
        shown_default="none",
    )


@dataclass(frozen=True)
class NoiseRange:
    """The levels of noise, and how a grid is spread over them; defaults are EDM's."""

    PANEL: ClassVar[str] = NOISE

    sigma_min: float = knob(0.002, "Smallest noise level.")
    sigma_max: float = knob(80.0, "Largest noise level, at which sampling begins.")
    rho: float = knob(7.0, "Curvature of the grid of noise levels.", minimum=1.0)

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise UsageError(
                f"--sigma-min {self.sigma_min:g} and --sigma-max {self.sigma_max:g} are not a "
                "range of positive numbers"
            )


@dataclass(frozen=True)
class NoiseLaw:
    """ln sigma ~ N(mean, std^2) in training; defaults are EDM's."""

    PANEL: ClassVar[str] = NOISE

    mean: float = knob(-1.2, "Mean of ln sigma in training.", "--p-mean")
    std: float = knob(1.2, "Standard deviation of ln sigma in training.", "--p-std", minimum=0.0)


@dataclass(frozen=True)
class Training:
    """The optimization of a run, and the steps at which it writes a checkpoint.

    The defaults are those of a teacher.
    """

    steps: int = knob(6000, "Training steps.", minimum=1, panel=OPTIMIZER)
    batch_size: int = knob(
        128,
        "Images per step, drawn with replacement.",
        "-b",
        "--batch-size",
        minimum=1,
        panel=OPTIMIZER,
    )
    rate: float = same_field(2e-3, Optimizer, "rate")
    warmup: int = same_field(100, Optimizer, "warmup")
    schedule: Schedule = knob(
        "constant",
        "Learning rate after the warm-up; cosine falls to 0 at the last step.",
        panel=OPTIMIZER,
    )
    max_norm: float = same_field(1.0, Optimizer, "max_norm")
    ema: float = same_field(0.999, Optimizer, "ema")
    checkpoints: int = knob(
        8,
        "Number of checkpoints, all of which are kept. Their steps grow by a constant factor from "
        "--first-checkpoint to the last step.",
        minimum=1,
    )
    first: int = knob(100, "Step of the first checkpoint.", "--first-checkpoint", minimum=1)
    seed: int = same(0, Seed)
    dropout: float = knob(
        0.0,
        "Share of the activations of a U-Net that each of its blocks sets to 0 in training. "
        "Dropout masks memorization.",
        minimum=0.0,
        maximum=0.99,
        panel=OPTIMIZER,
    )
    flip: bool = knob(
        False,
        "Mirror each image of a batch with probability 1/2; EDM's other augmentations are not "
        "here. Flips mask memorization, and 'dlmctl memo-eval' does not find copies of a mirrored "
        "image.",
        "--flip",
        panel=OPTIMIZER,
    )
    dtype: Dtype = knob(
        "float32",
        "bfloat16 computes convolutions and products in it, by autocast; weights, averages and "
        "optimizer stay in float32. Not for scd and sct.",
        panel=OPTIMIZER,
    )

    def recorded(self) -> dict[str, Any]:
        """What a run records of it. What later versions added is left out at its default, so that
        runs begun before can be resumed."""
        later = {known.name: known.default for known in fields(self) if known.name in ADDED}
        return {k: v for k, v in asdict(self).items() if k not in later or v != later[k]}

    def checkpoint_steps(self) -> list[int]:
        """The steps with a checkpoint."""
        if self.checkpoints == 1 or self.first >= self.steps:
            return [self.steps]
        factor = (self.steps / self.first) ** (1 / (self.checkpoints - 1))
        between = {round(self.first * factor**n) for n in range(self.checkpoints - 1)}
        return sorted(between | {self.steps})


@dataclass(frozen=True)
class Reports:
    """How often a run writes metrics, and the state that it can be resumed from."""

    log_every: int = knob(100, "Steps between metrics records.", minimum=1)
    save_minutes: float = knob(
        10.0, "Minutes between the states from which a killed run resumes.", minimum=0.0
    )
    log: list[str] | None = same(None, Log)
