"""A model made from another, as `dlmctl init --from` makes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob


@dataclass(frozen=True)
class Adapted:
    """Which model is adapted, and what its config.json will say."""

    PANEL: ClassVar[str] = "From another model"

    source: str | None = knob(
        None,
        "Autoregressive model whose weights, tokenizer and chat template the new model has; with "
        "--latents a masked diffusion model.",
        "--from",
        metavar="MODEL",
        shown_default="none: random weights",
    )
    pattern: Literal["bidirectional", "block-causal"] = knob(
        "bidirectional",
        "Attention to the whole text, or to the token's own block of --block-length tokens and to "
        "all blocks before it, as in BD3LM.",
    )
    shift: int = knob(
        1,
        "1: position i is predicted by the logits at position i - 1, as the source does, in Dream "
        "and in DiffuLLaMA; 0: by its own, as in A2D.",
        minimum=0,
        maximum=1,
    )
    mask_token: str | None = knob(
        None,
        "Mask token; it joins the vocabulary if it is not in it.",
        metavar="TEXT",
        shown_default="the tokenizer's mask token or its first reserved one, else <|mask|>",
    )

    latents: int = knob(
        1,
        "Mask tokens of a masked diffusion model: of several, each pass draws one, so that the "
        "tokens of a step need not be independent.",
        minimum=1,
        maximum=4096,
    )

    def __post_init__(self) -> None:
        chosen = (self.pattern, self.shift, self.mask_token)
        if self.source is None and chosen != ("bidirectional", 1, None):
            raise UsageError("--pattern, --shift and --mask-token are for --from MODEL")
        if self.latents > 1 and (self.source is None or chosen != ("bidirectional", 1, None)):
            raise UsageError(
                "--latents is for --from MODEL, a masked diffusion model, and goes without "
                "--pattern, --shift and --mask-token"
            )
        if self.mask_token == "":
            raise UsageError("--mask-token is empty")
