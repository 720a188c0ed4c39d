"""Options of the sampler, under the names of LLaDA's own generation code."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

GenLength = Annotated[
    int | None,
    typer.Option(min=1, show_default="the model's own, else 128", help="Tokens of a completion."),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="the model's own, else 32",
        help="Tokens of a block; blocks are decided from left to right.",
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="the model's own, else --gen-length",
        help="Denoising steps over all blocks, which decide equally many tokens; by --threshold or "
        "--factor a block takes as many as it needs instead.",
    ),
]
Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 is greedy; otherwise exact Gumbel-max sampling.")
]
CfgScale = Annotated[
    float, typer.Option(min=0.0, help="Classifier-free guidance, two passes a step; 0 is off.")
]
Remasking = Annotated[
    Literal["low_confidence", "random", "entropy", "margin", "sae"],
    typer.Option(
        help="Which tokens are masked again: how the confidence is measured. sae is our own "
        "experiment: confidence times how little the features of --sae change."
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default="off",
        help="Parallel decoding, as in Fast-dLLM: in each step keep every token with at least this "
        "confidence, and the surest one in any case, until the block is done.",
    ),
]
Factor = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        show_default="off",
        help="Parallel decoding, as in Fast-dLLM: in each step keep the n surest tokens, at least "
        "one, n as large as (n + 1)(1 - confidence of the n-th) is at most this, and with them a "
        "last one left over; until the block is done.",
    ),
]
Cache = Annotated[
    Literal["none", "prefix", "dual"],
    typer.Option(
        help="Approximate and faster: take keys and values from an earlier step, of the tokens "
        "before the block, or of all tokens outside it."
    ),
]
Refresh = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="at each block's start",
        help="With --cache: steps after which a pass over the whole sequence renews it.",
    ),
]
RefreshBelow = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default="0, which is off",
        help="With --cache: where the surest token of a step is less sure than this, renew it and "
        "take the step again.",
    ),
]
Eos = Annotated[
    Literal["normal", "late", "never"],
    typer.Option(
        help="End-of-sequence: like any token; decided last in its block, and with it LLaDA's end "
        "of a turn; or not sampled at all."
    ),
]
EarlyStop = Annotated[
    bool,
    typer.Option(
        "--early-stop/--full-length",
        help="End a completion when a finished block holds end-of-sequence.",
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Run the model through torch.compile: the same but for rounding, faster once it is "
        "compiled, which takes half a minute.",
    ),
]
Corrupt = Annotated[
    Literal["patch", "blank", "blur", "noise", "shuffle", "no-image"] | None,
    typer.Option(
        "--corrupt",
        show_default="off",
        help="Show a vision-language model corrupted images, to see what it answers without them: "
        "as in 'dlmctl advantage --corrupt'.",
    ),
]
CorruptProb = Annotated[
    float,
    typer.Option(min=0.0, max=1.0, help="Share of the squares that --corrupt patch blackens."),
]
