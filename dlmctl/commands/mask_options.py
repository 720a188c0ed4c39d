"""Options of training that say which masks a completion is scored under."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.settings.algorithms import defaults
from dlmctl.settings.mask_laws import Law

MASKS = "Masks"

Masks = Annotated[
    Law | None,
    typer.Option(
        show_default=defaults("law"),
        help="Mask law, as in 'dlmctl score-elbo'.",
        rich_help_panel=MASKS,
    ),
]
Level = Annotated[
    str | None,
    typer.Option(
        "--t",
        metavar="T or T-T",
        show_default="0-1",
        help="For sft: range of the share of hidden tokens; the masks are independent, or "
        "--masks quadrature.",
        rich_help_panel=MASKS,
    ),
]
MasksPerSample = Annotated[
    int | None,
    typer.Option(
        "-k",
        "--masks-per-sample",
        min=1,
        show_default=defaults("samples"),
        help="Masks for each completion.",
        rich_help_panel=MASKS,
    ),
]
PromptMask = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default=defaults("prompt_mask"),
        help="Probability that a token of the prompt is masked as well; for --masks block also a "
        "token of the blocks before.",
        rich_help_panel=MASKS,
    ),
]
UntilEos = Annotated[
    bool | None,
    typer.Option(
        "--until-eos/--all-tokens",
        show_default=defaults("until_eos", {True: "until-eos", False: "all-tokens"}),
        help="Score tokens up to the first end-of-sequence, or the whole completion.",
        rich_help_panel=MASKS,
    ),
]
FillTo = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="off",
        help="For sft: fill completions with end-of-sequence to so many tokens; those of an "
        "autoregressive model, which may have so many, end with one.",
        rich_help_panel=MASKS,
    ),
]
