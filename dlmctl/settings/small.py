"""Small new models, as `dlmctl init` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob
from dlmctl.settings.families import Variant, variant_summaries

SAMPLING = ("gen_length", "block_length", "steps")


@dataclass(frozen=True)
class SmallModel:
    """A small model of a family: its sizes, and its own defaults for sampling."""

    family: Variant = knob(
        "llada",
        f"{variant_summaries()} Both halves of a vision-language model have the given sizes.",
        metavar="FAMILY",
    )
    hidden_size: int = knob(64, "Width of the model.", minimum=2)
    layers: int = knob(2, "Number of layers.", minimum=1)
    heads: int = knob(4, "Attention heads.", minimum=1)
    intermediate_size: int | None = knob(
        None, "Width of the MLPs.", minimum=1, shown_default="8/3 of --hidden-size"
    )
    gen_length: int | None = knob(
        None, "The model's own default for rollout --gen-length.", minimum=1, shown_default="none"
    )
    block_length: int | None = knob(
        None,
        "The same for --block-length; of a block-causal model also how it attends.",
        minimum=1,
        shown_default="none; block-causal: 4",
    )
    steps: int | None = knob(None, "The same for --steps.", minimum=1, shown_default="none")

    @property
    def sampling(self) -> dict[str, int]:
        """Those of the model's own defaults that are set."""
        return {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}


@dataclass(frozen=True)
class SmallTokenizer:
    """The tokenizer of a small model."""

    tokenizer: Literal["char", "byte", "word", "bpe"] = knob(
        "char",
        "A token for each character of --alphabet, for each byte, for each word and punctuation "
        "mark of --vocabulary, or for each byte and the sequences of bytes that are most frequent "
        "in it (byte pair encoding).",
    )
    alphabet: str = knob(
        "0123456789+-*/(),:=", "Characters of the char tokenizer; the default is what puzzles need."
    )
    vocabulary: str | None = knob(
        None,
        "For word and bpe: JSONL with texts in `prompt`, `completion`, `text` and `messages`; - is "
        "standard input. A word tokenizer knows no word that is not in them.",
        metavar="FILE",
        shown_default="none",
    )
    vocabulary_size: int | None = knob(
        None,
        "For bpe: number of tokens, at least 259 for padding, end-of-sequence, mask and the bytes.",
        minimum=259,
        shown_default="bpe 4096",
    )

    def __post_init__(self) -> None:
        if (self.vocabulary is not None) != (self.tokenizer in ("word", "bpe")):
            raise UsageError(
                "--vocabulary FILE goes with --tokenizer word or bpe, and they with it"
            )
        if self.vocabulary_size is not None and self.tokenizer != "bpe":
            raise UsageError("--vocabulary-size is for --tokenizer bpe")
