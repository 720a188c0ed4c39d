"""Options of training that say which objective is descended, and with what constants."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dlmctl.settings.algorithms import CISPO_BOUND, Algorithm, Baseline, Scale, defaults

OBJECTIVE, ADVANTAGES = "Objective", "Advantages"

Algo = Annotated[
    Algorithm,
    typer.Option(
        help="rspo: residual feedback towards a target log-ratio; reinforce: the same with "
        "lambda 0; diffu-grpo (d1), wd1, espo, spg, gdsd, vrpo: its rivals, each with the "
        "constants it was published with (gdsd is for diffusion models alone); grpo: PPO's clip "
        "on every token, for autoregressive models as in TRL, for diffusion with the masks of the "
        "ELBO; srpo: the same with the advantage weighted by token, by the weights of the records "
        "(implements the mechanism described in the abstract of arXiv 2605.07274; constants are "
        "ours); sft: masked cross-entropy on the given completions.",
        rich_help_panel=OBJECTIVE,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--lambda",
        min=0.0,
        show_default=defaults("strength"),
        help="Feedback coefficient of RSPO; the target of the log-ratio is advantage/lambda.",
        rich_help_panel=OBJECTIVE,
    ),
]
ScoreNorm = Annotated[
    Literal["sequence", "token"] | None,
    typer.Option(
        show_default=defaults("score_norm"),
        help="Score of a completion: its ELBO, or the ELBO per token. One lambda of `token` "
        "is length times one of `sequence`. The paper could not be read on this; the default "
        "is ours.",
        rich_help_panel=OBJECTIVE,
    ),
]
Center = Annotated[
    Literal["batch", "prompt"] | None,
    typer.Option(
        show_default=defaults("center"),
        help="Where the mean of the log-ratios is taken.",
        rich_help_panel=OBJECTIVE,
    ),
]
ResidualMasks = Annotated[
    Literal["shared", "independent"] | None,
    typer.Option(
        show_default=defaults("residual_masks"),
        help="Masks that the log-ratio is measured under: those of the gradient, or a second "
        "draw, which makes the gradient unbiased for twice the forward passes.",
        rich_help_panel=OBJECTIVE,
    ),
]
LossType = Annotated[
    Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] | None,
    typer.Option(
        show_default=defaults("loss_type"),
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
        show_default=defaults("clip"),
        help="Half-width of the interval that ratios (gdsd: log-ratios) are clipped to; cispo "
        "has --clip-high alone.",
        rich_help_panel=OBJECTIVE,
    ),
]
ClipHigh = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        show_default=f"that of --clip; cispo {CISPO_BOUND:g}",
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
        show_default=defaults("beta"),
        help="Coefficient of the KL penalty; for spg the exponent of the upper bound, for vrpo "
        "the temperature of the preference.",
        rich_help_panel=OBJECTIVE,
    ),
]
Psi = Annotated[
    float | None,
    typer.Option(
        show_default=defaults("psi"),
        help="Scale of the advantage as a target.",
        rich_help_panel=OBJECTIVE,
    ),
]
Omega = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        show_default=defaults("omega"),
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
        show_default=defaults("inner"),
        help="Optimizer steps on a batch, each with masks of its own.",
        rich_help_panel=OBJECTIVE,
    ),
]
BaselineOption = Annotated[
    Baseline | None,
    typer.Option(
        "--baseline",
        show_default=defaults("baseline"),
        help="What is taken from a reward: the group's mean, the mean of the others "
        "(leave-one-out), or nothing.",
        rich_help_panel=ADVANTAGES,
    ),
]
ScaleOption = Annotated[
    Scale | None,
    typer.Option(
        "--scale",
        show_default=defaults("scale"),
        help="Divide by the standard deviation of the rewards of the group, or of the batch: all "
        "groups of a step.",
        rich_help_panel=ADVANTAGES,
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
