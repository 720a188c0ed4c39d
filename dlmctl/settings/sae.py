"""Training and evaluation of sparse autoencoders."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob, same
from dlmctl.settings.compute import Seed
from dlmctl.settings.parsing import DIGITS, byte_count, fractions

Aux = Literal["straight", "input", "pre", "rectified"]
SaeKind = Literal["topk", "batchtopk", "matryoshka"]
Scope = Literal["all", "matching", "both"]
Control = Literal["none", "gaussian", "pca"]
Layout = Literal["saelens", "dictionary_learning", "sparsify"]
"""Libraries whose folders of autoencoders we read and write."""

RECIPE, FEED, INSERTION = "Training recipe", "Activations", "Insertion"

PUBLISHED_ROWS = 250_000
"""Rows of the published shuffle buffer."""

PREFIXES = (Fraction(1, 32), Fraction(3, 32), Fraction(7, 32), Fraction(15, 32))
"""Of Bussmann et al. (2025, arXiv 2503.17547): 2,048, 6,144, 14,336 and 30,720 of 65,536."""

PROFILES: dict[str, dict[str, Any]] = {
    "corrected": {},
    "paper": {
        "level": "0.05-0.5",
        "per_batch": True,
        "pack": True,
        "aux": "rectified",
        "fitted_encoder": False,
        "buffer": "250000rows",
    },
}
"""Defaults that a profile changes, by the fields of the settings."""

Profile = Annotated[
    Literal["corrected", "paper"],
    Knob(
        "paper: as DLM-Scope was trained, which is --t 0.05-0.5 --level-per-batch --pack "
        "--aux rectified --decoder-length --buffer 250000rows. Options on the command line take "
        "precedence.",
        "--profile",
        presets=PROFILES,
    ),
]
Ks = Annotated[str, Knob("Number of active latents per token.", "-k", metavar="K,…")]

SaePaths = Annotated[
    list[str],
    Knob(
        "Folders of autoencoders, or directories of such folders; and JSONL files of a corpus, "
        "none, or -, being standard input.",
        metavar="SAE… [CORPUS…]",
        argument=True,
    ),
]


@dataclass(frozen=True)
class SaeRecipe:
    """How an autoencoder is trained; the defaults are published values unless marked as ours.

    The source is DLM-Scope (arXiv 2602.05859), which follows Gao et al. (2024, arXiv 2406.04093).
    """

    latents: int = knob(16_384, "Number of latents in a dictionary.", minimum=1, panel=RECIPE)
    batch_size: int = knob(
        2048, "Activations per step.", "--sae-batch-size", minimum=1, panel=RECIPE
    )
    tokens: int = knob(
        150_000_000,
        "Activations that each autoencoder is trained on. A corpus in files is read repeatedly, "
        "with new masks each time, until there are enough.",
        minimum=1,
        panel=RECIPE,
    )
    rate: float = knob(3e-4, "Learning rate of Adam.", "--lr", minimum=0.0, panel=RECIPE)
    warmup: int = knob(
        1000, "Steps of linear warm-up, at most a tenth of all steps.", minimum=0, panel=RECIPE
    )
    decay_from: float = knob(
        0.8,
        "Fraction of the steps after which the rate falls linearly to 0.",
        minimum=0.0,
        maximum=1.0,
        panel=RECIPE,
    )
    max_norm: float = knob(
        1.0,
        "Clip the gradient to this norm; 0 does not clip.",
        "--grad-norm",
        minimum=0.0,
        panel=RECIPE,
    )
    aux_weight: float = knob(
        1 / 32, "Weight of the auxiliary loss; 0 is off.", minimum=0.0, panel=RECIPE
    )
    dead_after: int | None = knob(
        None,
        "A latent counts as dead after this many activations on which it was not active.",
        minimum=1,
        shown_default="a fifteenth of --tokens, 10M of 150M",
        panel=RECIPE,
    )
    aux: Aux = knob(
        "straight",
        "Auxiliary loss, by which dead latents learn to explain the error. straight (ours): "
        "through their ReLU, with a straight-through gradient. input (ours): the same, but they "
        "explain the input, for runs too short to revive them by the error. pre: by their "
        "pre-activations without the ReLU, as in SAELens. rectified: through the ReLU, as "
        "published, where they get hardly any gradient.",
        panel=RECIPE,
    )
    fitted_encoder: bool = knob(
        True,
        "Scale the first encoder so that it explains as much as possible (ours), or give its rows "
        "the length of the decoder's.",
        "--fitted-length/--decoder-length",
        panel=RECIPE,
    )
    k_start: int | None = knob(
        None,
        "K at the first step, from which it falls to -k linearly.",
        minimum=1,
        shown_default="off",
        panel=RECIPE,
    )
    k_anneal: float = knob(
        0.1, "Fraction of the steps over which K falls.", minimum=0.0, maximum=1.0, panel=RECIPE
    )
    kind: SaeKind = knob(
        "topk",
        "topk: the K largest latents of an activation are active. batchtopk: those of a batch "
        "together, K on average; what is saved has a threshold instead, the running mean of the "
        "smallest active latent. matryoshka: batchtopk that also reconstructs from each of several "
        "prefixes of the dictionary, so that the first latents are the most general ones.",
        panel=RECIPE,
    )
    prefixes: str | None = knob(
        None,
        "With --kind matryoshka: the prefixes of the dictionary that reconstruct by themselves, as "
        "shares of --latents; the whole dictionary always does.",
        metavar="SHARE,…",
        shown_default=",".join(map(str, PREFIXES)),
        panel=RECIPE,
    )
    seed: int = same(0, Seed)

    def __post_init__(self) -> None:
        if self.prefixes is not None and self.kind != "matryoshka":
            raise UsageError(f"--prefixes means nothing to --kind {self.kind}")
        _ = self.prefix_ends

    @property
    def prefix_ends(self) -> list[int]:
        """Numbers of latents in the prefixes of `matryoshka`, the last being all of them.

        Raises:
            UsageError: they do not increase from 1 on.
        """
        if self.kind != "matryoshka":
            return []
        shares = PREFIXES if self.prefixes is None else fractions("--prefixes", self.prefixes)
        ends = [*(int(share * self.latents) for share in shares), self.latents]
        if ends[0] < 1 or any(after <= before for before, after in pairwise(ends)):
            raise UsageError(
                f"--prefixes {','.join(map(str, shares))} of {self.latents} --latents have "
                f"{','.join(map(str, ends[:-1]))} latents: each needs more than the one before it, "
                "and fewer than all"
            )
        return ends

    @property
    def about(self) -> dict[str, Any]:
        """What the metadata of an autoencoder say of its kind; nothing of `topk`."""
        if self.kind == "topk":
            return {}
        ends = self.prefix_ends
        return {"dlm_kind": self.kind, **({"dlm_prefixes": ends} if ends else {})}

    @property
    def dead_limit(self) -> int:
        """`dead_after`, or what it is by default."""
        return self.dead_after or max(1, self.tokens // 15)

    @property
    def steps(self) -> int:
        """Steps in all."""
        return max(1, self.tokens // self.batch_size)

    def buffer_capacity(self, rows: int) -> int:
        """Rows of a shuffle buffer that is asked for with `rows` rows.

        At least two batches, and at most all activations of the run.
        """
        return min(self.steps * self.batch_size, max(2 * self.batch_size, rows))

    def k_at(self, step: int, k: int) -> int:
        """K of step 0, 1, … for an autoencoder that ends with `k`."""
        progress = step / max(1.0, self.k_anneal * self.steps)
        if self.k_start is None or progress >= 1:
            return k
        return round(self.k_start + (k - self.k_start) * progress)


@dataclass(frozen=True)
class Feed:
    """How activations reach the autoencoders."""

    PANEL: ClassVar[str] = FEED

    drop_norms: float | None = knob(
        None,
        "Leave out activations whose norm is more than this many times the median.",
        minimum=1.0,
        shown_default="off",
    )
    buffer: str = knob(
        "auto",
        "Shuffle buffer of each layer and kind of positions, such as 2G or 250000rows. auto: as "
        "published, 250,000 rows, or fewer if all buffers would take more than a quarter of the "
        "free memory; a run that is resumed keeps what it began with.",
        metavar="SIZE",
    )
    sequences: int = knob(
        8, "Sequences per forward pass of the model.", "-b", "--batch-size", minimum=1
    )

    def __post_init__(self) -> None:
        self.buffer_rows(1, 0)  # raises UsageError

    def buffer_rows(self, row_bytes: int, room: int) -> int:
        """Rows of a buffer.

        Args:
            row_bytes: size of a row.
            room: bytes that it may take if it is `auto`.
        """
        if self.buffer == "auto":
            return max(1, min(PUBLISHED_ROWS, room // row_bytes))
        number = self.buffer.removesuffix("rows")
        if number == self.buffer:
            return max(1, byte_count("--buffer", self.buffer) // row_bytes)
        if not number.isdecimal() or not 0 < len(number) <= DIGITS:
            raise UsageError(f"--buffer {self.buffer} is not a number of rows such as 250000rows")
        return max(1, int(number))


@dataclass(frozen=True)
class Insertion:
    """The loss of the model while an autoencoder stands in for the activations."""

    PANEL: ClassVar[str] = INSERTION

    scope: Scope = knob(
        "all",
        "Positions at which an autoencoder stands in for the activations. all: all of them, as "
        "published. matching: those of the kind that it was trained on. both: autoencoders of "
        "masked and of visible tokens, with the same layer, K and directory, stand in together, "
        "each for its own kind.",
    )
    insert: bool = knob(
        True,
        "Measure the loss on insertion too, which takes a forward pass for each autoencoder.",
        "--insert/--no-insert",
    )
    keep_first: bool = knob(
        False,
        "Leave the first token of a text as it is. Autoencoders are never trained on first tokens.",
        "--keep-first/--replace-first",
    )
    ablate: bool = knob(
        True,
        "Compare with ablation too: two more passes for each layer and kind of positions, in which "
        "zeros, or the mean activation of the first 1,024 texts, take the place of the "
        "reconstruction.",
        "--ablate/--no-ablate",
    )
    control: Control = knob(
        "none",
        "What stands in for the activations in place of the reconstruction. gaussian: the "
        "activation plus random noise of the same norm as the error of reconstruction, token by "
        "token. pca: a reconstruction by the first principal components of activations of the "
        "same kind, as many as explain the share of variance that the autoencoder explains, the "
        "last of them in part; they are computed on the first 1,024 texts.",
    )

    def __post_init__(self) -> None:
        if not self.insert and (self.control != "none" or self.scope == "both"):
            option = "--scope both" if self.scope == "both" else f"--control {self.control}"
            raise UsageError(f"{option} is about the loss on insertion, and there is --no-insert")

    @property
    def needs_sample(self) -> bool:
        """Whether means or principal components are needed before anything is measured."""
        return self.insert and (self.ablate or self.control == "pca")
