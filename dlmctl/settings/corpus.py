"""A corpus under the forward masking process, and which activations of a model are taken on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, Shown, knob

Positions = Literal["mask", "unmask", "all", "clean"]
"""Masked tokens; visible tokens; both; tokens of text in which nothing is masked."""

CORPUS, ACTIVATIONS = "Corpus", "Activations"

CorpusFiles = Annotated[
    list[str] | None,
    Knob(
        "JSONL files of records with 'text', 'tokens', or 'prompt' and 'completion'; none, or -, "
        "is standard input.",
        metavar="CORPUS",
        argument=True,
        shown_default=False,
    ),
]
SaeModel = Annotated[
    str | None,
    Knob(
        "Hub name, directory or checkpoint; builtin:puzzles is the model that dlmctl ships.",
        "-m",
        "--model",
        metavar="MODEL",
        shown_default="the model that the autoencoder was trained on",
        env=True,
    ),
]
"""The model of a command that reads autoencoders, which name theirs."""
Sequences = Annotated[
    int, Knob("Sequences per forward pass of the model.", "-b", "--batch-size", minimum=1)
]
"""For commands whose results depend on the batches; others have `Compute`."""


@dataclass(frozen=True)
class Corpus:
    """How a corpus is cut into sequences and masked; None: as the autoencoder's was."""

    PANEL: ClassVar[str] = CORPUS

    level: str | None = knob(
        "0-1",
        "Level of the masks: each token is masked with probability t, which is drawn within this "
        "range.",
        "--t",
        metavar="T or T-T",
    )
    context: int | None = knob(
        2048,
        "Maximum number of tokens in a sequence; the rest of a longer text is cut off.",
        minimum=2,
    )
    per_batch: bool | None = knob(
        False,
        "Draw t once per batch, or for each sequence.",
        "--level-per-batch/--level-per-sequence",
    )
    pack: bool | None = knob(
        False,
        "Join documents with end-of-sequence and cut them into sequences of --context tokens.",
        "--pack/--no-pack",
    )
    hide_prompt: bool | None = knob(
        False,
        "Whether the tokens of a record's 'prompt' may be masked like others.",
        "--hide-prompt/--keep-prompt",
    )


AS_TRAINED = Corpus(level=None, context=None, per_batch=None, pack=None, hide_prompt=None)
"""Default of a command that reads autoencoders: the corpus is cut and masked as theirs was.

corpus: Annotated[Corpus, SHOWN_AS_TRAINED] = AS_TRAINED
"""
SHOWN_AS_TRAINED = Shown(
    level="the autoencoder's own, else 0-1",
    context="the autoencoder's own, else 2048",
    per_batch="per sequence",
    pack="the autoencoder's own, else no-pack",
    hide_prompt="the autoencoder's own, else keep-prompt",
)


@dataclass(frozen=True)
class Activations:
    """Which activations of a model are taken."""

    PANEL: ClassVar[str] = ACTIVATIONS

    layers: str | None = knob(
        None,
        "Blocks whose output (the residual stream) is taken, counted from 0.",
        metavar="L,…",
        shown_default="0, or all that are stored",
    )
    positions: str | None = knob(
        None,
        "Tokens whose activations are taken: mask, the masked ones; unmask, the visible ones; all, "
        "both; clean, those of a text in which nothing is masked. Never the first token.",
        metavar="KIND,…",
        shown_default="mask, or all that are stored",
    )

    def __post_init__(self) -> None:
        _ = self.layer_numbers, self.kinds  # raise UsageError

    @property
    def layer_numbers(self) -> list[int] | None:
        """Numbers of the blocks; None: not given."""
        return layer_numbers(self.layers) if self.layers else None

    @property
    def kinds(self) -> list[Positions] | None:
        """Kinds of positions; None: not given."""
        return position_kinds(self.positions) if self.positions else None


def position_kinds(text: str) -> list[Positions]:
    """The kinds in a list such as mask,unmask; raises UsageError for an unknown one."""
    known, kinds = get_args(Positions), list(dict.fromkeys(text.split(",")))
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"--positions {text}: '{kind}' is none of {', '.join(known)}")
    return kinds  # type: ignore[return-value]


def layer_numbers(text: str) -> list[int]:
    """The numbers in a list such as 1,5,10; raises UsageError if one is not a number."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"--layers {text} is not a list of layers such as 1,5,10")
    return list(dict.fromkeys(int(part) for part in parts))
