"""Options of training that say which objective is descended, and with what constants."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dlmctl.commands.options import Algorithm

OBJECTIVE = "Objective"

Algo = Annotated[
    Algorithm,
    typer.Option(
        help="rspo: residual feedback towards a target log-ratio; reinforce: the same with "
        "lambda 0; diffu-grpo (d1), wd1, espo, spg, gdsd, vrpo: its rivals, each with the "
        "constants it was published with; grpo: PPO's clip on every token, for autoregressive "
        "models as in TRL, for diffusion with the masks of the ELBO; srpo: the same with the "
        "advantage weighted by token, where the records bear weights (implements the mechanism "
        "described in the abstract of arXiv 2605.07274; constants are ours); sft: masked "
        "cross-entropy on the given completions.",
        rich_help_panel=OBJECTIVE,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        min=0.0,
        show_default="rspo 0.01",
        help="Feedback coefficient of RSPO; the target of the log-ratio is advantage/lambda.",
        rich_help_panel=OBJECTIVE,
    ),
]
ScoreNorm = Annotated[
    Literal["sequence", "token"] | None,
    typer.Option(
        show_default="rspo sequence",
        help="Score of a completion: its ELBO, or the ELBO per token. One lambda of `token` "
        "is length times one of `sequence`. The paper could not be read on this; the default "
        "is ours.",
        rich_help_panel=OBJECTIVE,
    ),
]
Center = Annotated[
    Literal["batch", "prompt"] | None,
    typer.Option(
        show_default="rspo batch",
        help="Where the mean of the log-ratios is taken.",
        rich_help_panel=OBJECTIVE,
    ),
]
ResidualMasks = Annotated[
    Literal["shared", "independent"] | None,
    typer.Option(
        show_default="rspo shared",
        help="Masks that the log-ratio is measured under: those of the gradient, or a second "
        "draw, which makes the gradient unbiased for twice the forward passes.",
        rich_help_panel=OBJECTIVE,
    ),
]
LossType = Annotated[
    Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] | None,
    typer.Option(
        show_default="grpo and srpo dapo",
        help="Average over tokens, under TRL's names: of the whole batch (dapo, and bnpo, as a "
        "step is one batch here); of each completion, then over completions (grpo); the sum over "
        "--max-length (dr_grpo); cispo: as dapo, the ratio a bounded constant.",
        rich_help_panel=OBJECTIVE,
    ),
]
Clip = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        show_default="diffu-grpo 0.5, espo, grpo and srpo 0.2, gdsd 0.0004",
        help="Half-width of the interval that ratios (gdsd: log-ratios) are clipped to; cispo "
        "has --clip-high alone.",
        rich_help_panel=OBJECTIVE,
    ),
]
ClipHigh = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        show_default="that of --clip; cispo 5",
        help="For grpo and srpo: how far above 1 ratios are clipped; for cispo their bound.",
        rich_help_panel=OBJECTIVE,
    ),
]
DualClip = Annotated[
    float | None,
    typer.Option(
        min=1.0,
        show_default="off",
        help="For grpo and srpo: ratios of bad completions count as this at most (EasyR1: 3).",
        rich_help_panel=OBJECTIVE,
    ),
]
Beta = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        show_default="diffu-grpo 0.04, espo 0.001, gdsd 0.001, spg 1.5, vrpo 0.1, grpo and srpo 0",
        help="Coefficient of the KL penalty; for spg the exponent of the upper bound, for vrpo "
        "the temperature of the preference.",
        rich_help_panel=OBJECTIVE,
    ),
]
Psi = Annotated[
    float | None,
    typer.Option(
        show_default="gdsd 1.0",
        help="Scale of the advantage as a target.",
        rich_help_panel=OBJECTIVE,
    ),
]
Omega = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default="spg 0.5",
        help="Share of the upper bound in the score of bad completions; 1 is the bound alone.",
        rich_help_panel=OBJECTIVE,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="the longest completion of the batch",
        help="For --loss-type dr_grpo: tokens that the loss of every completion is divided by.",
        rich_help_panel=OBJECTIVE,
    ),
]
Inner = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="diffu-grpo 12, wd1, espo and gdsd 8, spg 4, others 1",
        help="Optimizer steps on a batch, each with masks of its own.",
        rich_help_panel=OBJECTIVE,
    ),
]
Baseline = Annotated[
    Literal["mean", "loo", "none"] | None,
    typer.Option(
        show_default="espo loo, others mean",
        help="Advantages of records that bear none: as in 'dlmctl advantage'.",
        rich_help_panel=OBJECTIVE,
    ),
]
Scale = Annotated[
    Literal["none", "group", "batch"] | None,
    typer.Option(
        show_default="grpo and srpo group, others none",
        help="Standard deviation that those advantages are divided by.",
        rich_help_panel=OBJECTIVE,
    ),
]
DropZeroAdvantage = Annotated[
    bool,
    typer.Option(
        "--drop-zero-adv/--keep-zero-adv",
        help="Leave out completions with advantage 0. RSPO learns from them: they pull back "
        "to the reference.",
        rich_help_panel=OBJECTIVE,
    ),
]
