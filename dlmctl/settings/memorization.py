"""What is measured of samples, texts and networks that may have memorized their training data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, same
from dlmctl.settings.common import Memory, Seed
from dlmctl.settings.images import Gray
from dlmctl.settings.parsing import byte_count, float_grid, whole_numbers

Mode = Literal["prefix", "suffix", "edge", "random"]
Method = Literal["loss", "ratio", "zlib", "sama"]
NEED_REFERENCE: tuple[Method, ...] = ("ratio", "sama")
BULKS = ("gen", "mem", "null")
"""Groups of eigen-directions, by falling eigenvalue: d that generalize, n - d that memorize, and
p - n that change neither loss."""

REQUIRED: Any = dataclasses.MISSING
IMAGES, COPIES, QUALITY, GALLERY = "Images", "Copies", "Quality", "Gallery"
MODEL, TRAINING = "Model", "Training"


@dataclass(frozen=True)
class Bootstrap:
    """Intervals by Efron's percentile bootstrap.

    The same seed draws the same places, so that values of the same samples are resampled together.
    """

    resamples: int = knob(
        1000, "Bootstrap resamples for intervals and p-values.", "--bootstrap", minimum=1
    )
    confidence: float = knob(
        0.95, "Confidence of the intervals.", "--confidence", minimum=0.5, maximum=0.9999
    )
    seed: int = same(0, Seed)


@dataclass(frozen=True)
class ImageSources:
    """Where samples, and the images that they are compared with, are read from."""

    samples: list[str] = knob(
        REQUIRED,
        "What was generated: builtin:digits, FILE.safetensors (bytes, or floats in [-1, 1] or "
        "[0, 1]), a directory of images, JSONL, or a data set; #A:B takes a part of it. "
        "Repeatable: a record for each.",
        "--samples",
        metavar="SET",
        panel=IMAGES,
    )
    train: str = knob(
        REQUIRED, "What the model was trained on.", "--train", metavar="SET", panel=IMAGES
    )
    heldout: str | None = knob(
        None,
        "As many images of the same kind that it was not trained on, with which every figure is "
        "taken too. A larger set is cut; a smaller one gives a warning.",
        "--heldout",
        metavar="SET",
        shown_default="none",
        panel=IMAGES,
    )
    gray: bool = same(False, Gray)


@dataclass(frozen=True)
class SampleStudy:
    """What is measured of samples, and how."""

    threshold: float = knob(
        1 / 3,
        "A sample is memorized if its ratio d1 / d2 is below this.",
        "--threshold",
        minimum=0,
        maximum=1,
        shown_default="1/3",
        panel=COPIES,
    )
    distance: float | None = knob(
        None,
        "Add f_near: the share of samples with d1 up to this, in L2 of pixels in [-1, 1].",
        "--distance",
        minimum=0,
        shown_default="off",
        panel=COPIES,
    )
    dedup: bool = knob(
        False,
        "Leave duplicates out of the training and held-out sets.",
        "--dedup",
        panel=COPIES,
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
    extractor: Path | None = knob(
        None,
        "Model whose features of images are compared by cosine: a directory with config.json and "
        "safetensors that transformers loads.",
        "--extractor",
        metavar="DIRECTORY",
        shown_default="none",
        panel=COPIES,
    )
    features: str | None = knob(
        None,
        "Instead of --extractor: safetensors of features [N, F], one row per image.",
        "--features",
        metavar="SAMPLES,TRAIN[,HELDOUT]",
        shown_default="none",
        panel=COPIES,
    )
    copy_threshold: str = knob(
        "0.5,0.6",
        "Add the share of samples with a cosine above each of these.",
        "--copy-threshold",
        metavar="COSINE,…",
        panel=COPIES,
    )
    quality: bool = knob(
        True,
        "Fréchet distance, precision, recall, density, coverage and MMD.",
        "--quality/--no-quality",
        panel=QUALITY,
    )
    space: str = knob(
        "auto",
        "Space of --quality: pixels, features, or pca:K, principal components of the training and "
        "held-out sets together. auto is features if there are any, else pca:32, or a quarter of "
        "the smallest set.",
        "--space",
        metavar="SPACE",
        panel=QUALITY,
    )
    ridge: float | None = knob(
        None,
        "For the Fréchet distance: add this many mean variances along every direction.",
        "--ridge",
        minimum=0,
        shown_default="a singular covariance is refused",
        panel=QUALITY,
    )
    k: int = knob(
        5,
        "Nearest neighbours for precision, recall, density and coverage.",
        "-k",
        minimum=1,
        panel=QUALITY,
    )
    memory: str = same("512M", Memory)

    def __post_init__(self) -> None:
        self.copy_thresholds, self.memory_bytes  # noqa: B018 (raises)
        if self.tolerance and not self.dedup:
            raise UsageError("--dedup-within is for --dedup")
        if self.extractor and self.features:
            raise UsageError("--extractor and --features are two ways to the same: give one")

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
class Gallery:
    """A picture of samples and their nearest images."""

    gallery: Path | None = knob(
        None,
        "Picture of samples with their nearest images, by ratio.",
        "--gallery",
        metavar="FILE.png",
        shown_default="none",
        panel=GALLERY,
    )
    gallery_rows: int = knob(
        24, "Samples in the picture.", "--gallery-rows", minimum=1, panel=GALLERY
    )
    gallery_spread: bool = knob(
        False,
        "Show samples over the whole range of ratios, not those with the lowest.",
        "--gallery-spread",
        panel=GALLERY,
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
        "--mode",
        metavar="MODES",
    )
    given: float = knob(
        0.5,
        "Share of a text's tokens that is given; at least one is given and one asked for.",
        "--given",
        minimum=0.0,
        maximum=1.0,
    )
    steps: str = knob(
        "1,2,4,8,16",
        "Sampling steps for the tokens asked for; compare models at the same number.",
        "--steps",
        metavar="NUMBERS",
    )
    orders: int = knob(
        8,
        "Random orders over which the probability of a text is averaged; 0 takes the order of "
        "confidence.",
        "--orders",
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
        "--reference",
        metavar="MODEL",
        shown_default="none",
    )
    method: str | None = knob(
        None,
        "loss, ratio (to the reference), zlib (by compressed length), sama (masked tokens of "
        "growing masks against the reference); several separated by commas.",
        "--method",
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

    sama_steps: int = knob(4, "Masks of sama.", "--sama-steps", minimum=1)
    sama_tokens: int = knob(8, "Tokens in a subset of sama, l.", "--sama-tokens", minimum=1)


def noise_variance(time: float) -> float:
    """D = 1 - e^-2t."""
    return -math.expm1(-2 * time)


@dataclass(frozen=True)
class FeatureModel:
    """Sizes, diffusion time and data of the random-feature model."""

    psi_n: float = knob(6, "Samples per dimension, n/d; above 1.", "--psi-n", panel=MODEL)
    psi_p: float = knob(24, "Features per dimension, p/d; above --psi-n.", "--psi-p", panel=MODEL)
    dimension: int = knob(
        50,
        "Dimension d of the data; the work grows as (p/d x d)^3.",
        "-d",
        "--dimension",
        minimum=2,
        panel=MODEL,
    )
    time: float = knob(
        0.05, "Diffusion time at which the score is learned.", "-t", "--time", panel=MODEL
    )
    variances: str = knob(
        "1",
        "Eigenvalues of the data's covariance, in equal shares: 0.5,1.5.",
        "--variances",
        metavar="LIST",
        panel=MODEL,
    )

    def __post_init__(self) -> None:
        if not self.dimension < self.samples < self.features:
            raise UsageError(
                f"--psi-n {self.psi_n:g} and --psi-p {self.psi_p:g}: "
                "the bulks are separate only if 1 < psi-n < psi-p"
            )
        if not 0 < self.time < math.inf:
            raise UsageError(f"--time {self.time:g} is not a number above 0")
        if min(self.eigenvalues) <= 0 or self.dimension < 2 * len(self.eigenvalues):
            raise UsageError(
                "--variances are positive numbers, at most one for every two of the --dimension"
            )

    @cached_property
    def eigenvalues(self) -> list[float]:
        """Eigenvalues of Sigma, in equal shares."""
        return float_grid("--variances", self.variances)

    @property
    def samples(self) -> int:
        """n."""
        return round(self.psi_n * self.dimension)

    @property
    def features(self) -> int:
        """p."""
        return round(self.psi_p * self.dimension)

    @property
    def noise(self) -> float:
        """D, the variance of the noise."""
        return noise_variance(self.time)

    @property
    def data_variance(self) -> float:
        """trace(Sigma) / d."""
        return sum(self.eigenvalues) / len(self.eigenvalues)

    def bulks(self) -> dict[str, slice]:
        """Ranks of the eigenvalues of each bulk, the largest first."""
        d, n, p = self.dimension, self.samples, self.features
        return dict(zip(BULKS, (slice(0, d), slice(d, n), slice(n, p)), strict=True))


@dataclass(frozen=True)
class FeatureTraining:
    """How teachers and students of the random-feature model are trained."""

    delta: float = knob(
        0.04,
        "Length of the teacher's step in distillation; below --time.",
        "--delta",
        panel=TRAINING,
    )
    teacher_tau: list[str] | None = knob(
        None,
        "Training times of the teachers that students are distilled from; repeatable.",
        "--teacher-tau",
        metavar="LIST",
        shown_default="1e4",
        panel=TRAINING,
    )
    taus: str = knob(
        "1:1e8:33",
        "Training times of the rows: numbers, or LOW:HIGH:COUNT, evenly spaced in the logarithm.",
        "--taus",
        metavar="LIST",
        panel=TRAINING,
    )
    student_init: Literal["teacher", "zero"] = knob(
        "teacher", "Initial weights of a student.", "--student-init", panel=TRAINING
    )
    lr: float | None = knob(
        None,
        "Train teachers by gradient descent with this learning rate; --taus are rounded to its "
        "steps.",
        "--lr",
        shown_default="gradient flow",
        panel=TRAINING,
    )
    draws: int = knob(
        0,
        "Learn from this many fixed draws of the noise per sample; 0 learns from all noise, "
        "exactly. Losses are always under all noise.",
        "--draws",
        minimum=0,
        panel=TRAINING,
    )
    noise_draws: int | None = knob(
        None,
        "Draws of the noise per sample for the part of the student that is not exact. Not with "
        "--draws, which the student uses too.",
        "--noise-draws",
        minimum=1,
        shown_default="20 p/n",
        panel=TRAINING,
    )
    seed: int = same(0, Seed)

    def __post_init__(self) -> None:
        if min(*self.times, *self.teacher_times) < 0:
            raise UsageError("--taus and --teacher-tau are times, which are not below 0")
        if self.lr is not None and self.lr <= 0:
            raise UsageError(f"--lr {self.lr:g} is not above 0")
        if self.noise_draws and self.draws:
            raise UsageError("--noise-draws are for students of all noise: not with --draws")

    @cached_property
    def times(self) -> list[float]:
        """Training times of the rows."""
        return float_grid("--taus", self.taus)

    @cached_property
    def teacher_times(self) -> list[float]:
        """Training times of the teachers that students are distilled from."""
        texts = self.teacher_tau or ["1e4"]
        return [time for text in texts for time in float_grid("--teacher-tau", text)]
