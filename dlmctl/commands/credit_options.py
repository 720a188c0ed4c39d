"""Options of `advantage --algo srpo`: how tokens get credit by their role."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from dlmctl.records.errors import UsageError

CONTRAST, WEIGHTS = "Contrasts (--algo srpo)", "Weights (--algo srpo)"

VisualSignal = Annotated[
    Literal["logratio", "k3", "abs-logratio", "full-kl"],
    typer.Option(
        help="Signal of a perception token: log-probability with the image less that with the "
        "corrupted one (ours), their k3 as in VPPO, the absolute value, or the divergence of the "
        "whole distributions.",
        rich_help_panel=CONTRAST,
    ),
]
ReasonSignal = Annotated[
    Literal["logratio", "k3", "abs-logratio"],
    typer.Option(
        help="The same of a reasoning token, from --reason-contrast (ours: logratio).",
        rich_help_panel=CONTRAST,
    ),
]
ReasonContrast = Annotated[
    Literal["drop", "swap", "blind", "blind-drop"],
    typer.Option(
        help="What reasoning is compared with: the perception left out (ours), another sample's "
        "perception, the image corrupted (what then stays likely is favoured), or perception left "
        "out under the corrupted image on both sides.",
        rich_help_panel=CONTRAST,
    ),
]
Corrupt = Annotated[
    Literal["patch", "blank", "blur", "noise", "shuffle", "no-image"],
    typer.Option(
        "--corrupt",
        help="Corrupted image: squares of single tokens black (ours), all black, Gaussian blur of "
        "6 pixels, noise of deviation 189/255, the squares in another order, or no image at all.",
        rich_help_panel=CONTRAST,
    ),
]
CorruptProb = Annotated[
    float,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of the squares that `patch` blackens (PAPO 0.6).",
        rich_help_panel=CONTRAST,
    ),
]
CorruptScope = Annotated[
    Literal["prompt", "rollout"],
    typer.Option(
        help="One corruption for all samples of a prompt (ours), or one for each.",
        rich_help_panel=CONTRAST,
    ),
]
CorruptSeed = Annotated[
    int, typer.Option(help="Seed of the corruptions.", rich_help_panel=CONTRAST)
]
CreditBaseline = Annotated[
    Literal["traj-mean", "role-mean", "none", "traj-ratio"],
    typer.Option(
        help="What signals are taken relative to: the mean over both roles of the completion "
        "(ours, for the paper's shared baseline), over each role, nothing, or the mean over both "
        "as a divisor.",
        rich_help_panel=WEIGHTS,
    ),
]
WeightMap = Annotated[
    Literal["exp", "softplus", "sigmoid2", "tanh1"],
    typer.Option(
        help="From signal to weight: exp(x) as in RLSD (ours), softplus(x)/log 2, 2 sigmoid(x), "
        "1 + tanh(x).",
        rich_help_panel=WEIGHTS,
    ),
]
WeightClip = Annotated[
    str,
    typer.Option(
        metavar="LOW,HIGH", help="Bounds of the weight (RLSD 0.8,1.2).", rich_help_panel=WEIGHTS
    ),
]
WeightTau = Annotated[
    float,
    typer.Option(min=0.0, help="Factor of the signal; 0 is plain GRPO.", rich_help_panel=WEIGHTS),
]
WeightLambda = Annotated[
    float,
    typer.Option(
        min=0.0,
        help="Share of the weight that goes by the signal (RLSD 0.5); 0 is plain GRPO.",
        rich_help_panel=WEIGHTS,
    ),
]
WeightNorm = Annotated[
    Literal["none", "mean"],
    typer.Option(
        help="mean: weights of the tokens with a role have mean 1.", rich_help_panel=WEIGHTS
    ),
]
SignAware = Annotated[
    bool,
    typer.Option(
        "--sign-aware/--sign-blind",
        help="Turn the signal over where the advantage is negative, as RLSD does.",
        rich_help_panel=WEIGHTS,
    ),
]


def bounds(text: str) -> tuple[float, float]:
    """The two numbers of --weight-clip; raises UsageError."""
    low, _, high = text.partition(",")
    try:
        return float(low), float(high)
    except ValueError:
        raise UsageError(f"--weight-clip {text} is not LOW,HIGH such as 0.8,1.2") from None
