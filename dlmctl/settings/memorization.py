"""What is measured of samples and texts that may repeat the training data of a model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, same
from dlmctl.settings.compute import Memory, Seed
from dlmctl.settings.parsing import byte_count, whole_numbers

Mode = Literal["prefix", "suffix", "edge", "random"]
Method = Literal["loss", "ratio", "zlib", "sama"]
NEED_REFERENCE: tuple[Method, ...] = ("ratio", "sama")
InceptionResize = Literal["tensorflow", "clean"]
Control = Literal["gaussian"]

REQUIRED: Any = dataclasses.MISSING
COPIES, QUALITY, ENCODERS, GALLERY = "Copies", "Quality", "Encoders of images", "Gallery"


@dataclass(frozen=True)
class Bootstrap:
    """Intervals by Efron's percentile bootstrap.

    The same seed draws the same places, so that values of the same samples are resampled together.
    """

    resamples: int = knob(
        1000, "Bootstrap resamples for intervals and p-values.", "--bootstrap", minimum=1
    )
    confidence: float = knob(0.95, "Confidence of the intervals.", minimum=0.5, maximum=0.9999)
    seed: int = same(0, Seed)


@dataclass(frozen=True)
class ImageSources:
    """Where samples, and the images that they are compared with, are read from."""

    samples: list[str] = knob(
        REQUIRED,
        "What was generated: builtin:digits, FILE.safetensors (bytes, or floats in [-1, 1] or "
        "[0, 1]), a directory of images, JSONL, or a data set; @SPLIT and #A:B take a part of it. "
        "Repeatable: a record for each.",
        metavar="SET",
    )
    train: str = knob(REQUIRED, "What the model was trained on.", metavar="SET")
    heldout: str | None = knob(
        None,
        "Images of the same kind that it was not trained on, with which every figure is taken too: "
        "distances with as many as --train has, quality with all. Fewer give a warning.",
        metavar="SET",
        shown_default="none",
    )


@dataclass(frozen=True)
class SampleStudy:
    """What is measured of samples, and how."""

    threshold: float = knob(
        1 / 3,
        "A sample is memorized if its ratio d1 / d2 is below this.",
        minimum=0,
        maximum=1,
        shown_default="1/3",
        panel=COPIES,
    )
    distance: float | None = knob(
        None,
        "Add f_near: the share of samples with d1 up to this, in L2 of pixels in [-1, 1].",
        minimum=0,
        shown_default="off",
        panel=COPIES,
    )
    dedup: bool = knob(
        False, "Leave duplicates out of the training and held-out sets.", "--dedup", panel=COPIES
    )
    tolerance: float = knob(
        0.0,
        "With --dedup: images within this distance also count as duplicates. Near duplicates mask "
        "copies as well.",
        "--dedup-within",
        minimum=0,
        metavar="L2",
        panel=COPIES,
    )
    copy_threshold: str = knob(
        "0.5,0.6",
        "Add the share of samples with a cosine above each of these.",
        metavar="COSINE,…",
        panel=COPIES,
    )
    quality: bool = knob(
        True,
        "Precision, recall, density, coverage, MMD and Fréchet distance.",
        "--quality/--no-quality",
        panel=QUALITY,
    )
    space: str = knob(
        "auto",
        "Space of --quality: pixels, features (of --extractor or --features), inception, or pca:K, "
        "principal components of the training and held-out sets together. auto is features if "
        "there are any, else inception if there is one, else pca:32, or a quarter of the smallest "
        "set.",
        metavar="SPACE",
        panel=QUALITY,
    )
    control: Control | None = knob(
        None,
        "Also study as many samples of a control: gaussian draws from a normal distribution with "
        "the mean and the covariance of the pixels of --train. A Fréchet distance that is not well "
        "below the control's says nothing of quality.",
        shown_default="none",
        panel=QUALITY,
    )
    ridge: float | None = knob(
        None,
        "For the Fréchet distance: add this many mean variances along every direction.",
        minimum=0,
        shown_default="a singular covariance is refused, except for fid",
        panel=QUALITY,
    )
    k: int = knob(
        5,
        "Nearest neighbours for precision, recall, density and coverage.",
        "-k",
        minimum=1,
        panel=QUALITY,
    )
    kid_subsets: int = knob(
        100, "For kid: subsets over which it is averaged.", minimum=1, panel=QUALITY
    )
    kid_subset_size: int = knob(
        1000,
        "For kid: images of a subset; the smallest set if that has fewer.",
        minimum=2,
        panel=QUALITY,
    )
    memory: str = same("512M", Memory)

    def __post_init__(self) -> None:
        self.copy_thresholds, self.memory_bytes  # noqa: B018 (raises)
        if self.tolerance and not self.dedup:
            raise UsageError("--dedup-within is for --dedup")

    @cached_property
    def copy_thresholds(self) -> list[float]:
        """Cosines above which features are those of a copy."""
        try:
            cosines = [float(part) for part in self.copy_threshold.split(",")]
        except ValueError:
            cosines = [math.nan]
        if not all(-1 <= cosine <= 1 for cosine in cosines):
            raise UsageError(f"--copy-threshold {self.copy_threshold} is not a list of cosines")
        return cosines

    @cached_property
    def memory_bytes(self) -> int:
        """Bytes for blocks of distances."""
        return byte_count("--memory", self.memory)


@dataclass(frozen=True)
class Encoders:
    """Networks whose features of images are compared, with weights in files that the user has."""

    PANEL: ClassVar[str] = ENCODERS

    sscd: Path | None = knob(
        None,
        "Weights of SSCD, for cosines (sim): a sscd_….torchvision.pt as published, or its tensors "
        "as safetensors. TorchScript is code and refused. Images are fed with 288 pixels on the "
        "short side.",
        metavar="FILE",
        shown_default="none",
    )
    lpips: Path | None = knob(
        None,
        "Weights of torchvision's AlexNet (alexnet-owt-….pth) or VGG16 (vgg16-….pth), or their "
        "tensors as safetensors, for lpips: the perceptual distance of a sample to its nearest "
        "training image. Needs --lpips-heads.",
        metavar="FILE",
        shown_default="none",
    )
    lpips_heads: Path | None = knob(
        None,
        "Heads of LPIPS for that network: the tensors of weights/v0.1/alex.pth or vgg.pth of the "
        "package lpips, which are pickles, as safetensors; the refusal says how to convert them.",
        metavar="FILE",
        shown_default="none",
    )
    inception: Path | None = knob(
        None,
        "Weights of FID's Inception network, for fid and kid: "
        "pt_inception-2015-12-05-6726825d.pth, or its tensors as safetensors.",
        metavar="FILE",
        shown_default="none",
    )
    inception_resize: InceptionResize = knob(
        "tensorflow",
        "How images get Inception's 299 pixels: tensorflow is bilinear without antialiasing, as "
        "torch-fidelity has it; clean is bicubic with antialiasing, as clean-fid has it.",
    )
    extractor: Path | None = knob(
        None,
        "Model whose features are a space of quality, and are compared by cosine if there is no "
        "--sscd: a directory with config.json and safetensors that transformers loads. "
        "facebook/dinov2-large gives fd the value that is published as FD-DINOv2.",
        metavar="DIRECTORY",
        shown_default="none",
    )
    features: str | None = knob(
        None,
        "Instead of --extractor: safetensors of features [N, F], one row per image.",
        metavar="SAMPLES,TRAIN[,HELDOUT]",
        shown_default="none",
    )

    def __post_init__(self) -> None:
        if self.extractor and self.features:
            raise UsageError("--extractor and --features are two ways to the same: give one")
        if bool(self.lpips) != bool(self.lpips_heads):
            raise UsageError("--lpips and --lpips-heads are the two parts of LPIPS: give both")


@dataclass(frozen=True)
class Gallery:
    """A picture of samples and their nearest images."""

    PANEL: ClassVar[str] = GALLERY

    gallery: Path | None = knob(
        None,
        "Picture of samples with their nearest images, by ratio.",
        metavar="FILE.png",
        shown_default="none",
    )
    gallery_rows: int = knob(24, "Samples in the picture.", minimum=1)
    gallery_spread: bool = knob(
        False,
        "Show samples over the whole range of ratios, not those with the lowest.",
        "--gallery-spread",
    )

    def __post_init__(self) -> None:
        if self.gallery and self.gallery.suffix.lower() != ".png":
            raise UsageError(f"--gallery {self.gallery} does not end in .png")


@dataclass(frozen=True)
class Extraction:
    """Which part of a text a model is asked for, and when the text counts as extractable."""

    mode: str = knob(
        "prefix",
        "Which part of a text is given: prefix, suffix, edge (both ends) or random; several "
        "separated by commas.",
        metavar="MODES",
    )
    given: float = knob(
        0.5,
        "Share of a text's tokens that is given; at least one is given and one asked for.",
        minimum=0.0,
        maximum=1.0,
    )
    steps: str = knob(
        "1,2,4,8,16",
        "Sampling steps for the tokens asked for; compare models at the same number.",
        metavar="NUMBERS",
    )
    orders: int = knob(
        8,
        "Random orders over which the probability of a text is averaged; 0 takes the order of "
        "confidence.",
        minimum=0,
    )
    n: int = knob(100, "Samples that may be drawn.", "-n", minimum=1)
    p: float = knob(
        0.5,
        "A text is extractable if it is among these samples with at least this probability.",
        "-p",
    )
    seed: int = same(0, Seed)

    def __post_init__(self) -> None:
        self.modes, self.step_counts  # noqa: B018 (raises)
        if not 0 < self.p < 1:
            raise UsageError(f"-p {self.p:g} is not between 0 and 1")

    @cached_property
    def modes(self) -> list[Mode]:
        """The parts that are given, one at a time."""
        modes: list[Any] = self.mode.split(",")
        for mode in modes:
            if mode not in get_args(Mode):
                raise UsageError(f"--mode {mode} is not one of {', '.join(get_args(Mode))}")
        return modes

    @cached_property
    def step_counts(self) -> list[int]:
        """The numbers of sampling steps."""
        return whole_numbers("--steps", self.steps)


@dataclass(frozen=True)
class Attacks:
    """Which membership inference attacks are tried."""

    reference: str | None = knob(
        None,
        "A model that has seen neither file: the one that training began with, or one trained "
        "without the members. ratio and sama need it.",
        metavar="MODEL",
        shown_default="none",
    )
    method: str | None = knob(
        None,
        "loss, ratio (to the reference), zlib (by compressed length), sama (masked tokens of "
        "growing masks against the reference); several separated by commas.",
        metavar="METHODS",
        shown_default="loss,zlib; with a reference ratio and sama too",
    )
    samples: int = knob(8, "Masks per ELBO; an even number.", "-k", "--masks-per-sample", minimum=2)

    def __post_init__(self) -> None:
        self.methods  # noqa: B018 (raises)

    @cached_property
    def methods(self) -> list[Method]:
        """The attacks, in the order in which they were asked for."""
        default = "loss,ratio,zlib,sama" if self.reference else "loss,zlib"
        methods: list[Any] = (self.method or default).split(",")
        for name in methods:
            if name not in get_args(Method):
                raise UsageError(f"--method {name} is not one of {', '.join(get_args(Method))}")
            if name in NEED_REFERENCE and self.reference is None:
                raise UsageError(f"--method {name} needs a --reference")
        return methods


@dataclass(frozen=True)
class Sama:
    """Constants of SAMA; defaults are those of its published configuration."""

    sama_steps: int = knob(4, "Masks of sama.", minimum=1)
    sama_tokens: int = knob(8, "Tokens in a subset of sama, l.", minimum=1)
