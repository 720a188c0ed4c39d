"""Options of `update --algo`: which algorithm, the constants of its loss, and its advantages.

Defaults, and what help shows of them, are from the table of algorithms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any, ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob, knob_of
from dlmctl.settings.algorithms import (
    CISPO_BOUND,
    PROMPTS_PER_STEP,
    RECIPES,
    Algorithm,
    Baseline,
    Scale,
    defaults,
)

OBJECTIVE, ADVANTAGES = "Objective", "Advantages"

Algo = Annotated[
    Algorithm,
    Knob(
        f"{'; '.join(f'{algo}: {recipe.summary}' for algo, recipe in RECIPES.items())}. Each has "
        "the constants that it was published with.",
        metavar="ALGO",
        panel=OBJECTIVE,
    ),
]


@dataclass(frozen=True)
class Constants:
    """Constants of the losses; what is None is as the algorithm was published."""

    PANEL: ClassVar[str] = OBJECTIVE

    strength: float | None = knob(
        None,
        "Feedback coefficient of RSPO; the target of the log-ratio is advantage/lambda.",
        "--lambda",
        minimum=0.0,
        shown_default=defaults("strength"),
    )
    score_norm: Literal["sequence", "token"] | None = knob(
        None,
        "Score of a completion: its ELBO, or the ELBO per token. One lambda of `token` is length "
        "times one of `sequence`. We could not read what the paper does; the default is ours.",
        shown_default=defaults("score_norm"),
    )
    center: Literal["batch", "prompt"] | None = knob(
        None, "What the mean of the log-ratios is taken over.", shown_default=defaults("center")
    )
    residual_masks: Literal["shared", "independent"] | None = knob(
        None,
        "Masks that the log-ratio is measured under: those of the gradient, or a second draw, "
        "which makes the gradient unbiased for twice the forward passes.",
        shown_default=defaults("residual_masks"),
    )
    loss_type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"] | None = knob(
        None,
        "Average over tokens, under TRL's names: of the whole batch (dapo, and bnpo, since a step "
        "is one batch here); of each completion, then over completions (grpo); the sum over "
        "--max-length (dr_grpo); cispo: like dapo, with the ratio a bounded constant.",
        shown_default=defaults("loss_type"),
    )
    clip: float | None = knob(
        None,
        "Half-width of the interval that ratios (gdsd: log-ratios) are clipped to; cispo has "
        "--clip-high alone.",
        minimum=0.0,
        shown_default=defaults("clip"),
    )
    clip_high: float | None = knob(
        None,
        "For grpo, srpo and justgrpo: how far above 1 ratios are clipped; for cispo their bound.",
        minimum=0.0,
        shown_default=f"that of --clip; cispo {CISPO_BOUND:g}",
    )
    dual_clip: float | None = knob(
        None,
        "For grpo, srpo, justgrpo and bgpo: ratios of bad completions count as at most this "
        "(EasyR1: 3).",
        minimum=1.0,
        shown_default="bgpo 3, others off",
    )
    beta: float | None = knob(
        None,
        "Coefficient of the KL penalty, for tracerl to the policy that sampled, else to the "
        "reference; for spg the exponent of the upper bound, for vrpo the "
        "temperature of the preference.",
        minimum=0.0,
        shown_default=defaults("beta"),
    )
    psi: float | None = knob(
        None, "Scale of the advantage as a target.", shown_default=defaults("psi")
    )
    omega: float | None = knob(
        None,
        "Share of the upper bound in the score of bad completions; 1 is the bound alone.",
        minimum=0.0,
        maximum=1.0,
        shown_default=defaults("omega"),
    )
    max_length: int | None = knob(
        None,
        "For --loss-type dr_grpo: tokens that the loss of every completion is divided by.",
        minimum=1,
        shown_default="the longest completion of the batch",
    )

    def of(self, algo: Algorithm) -> dict[str, Any]:
        """The constants of an algorithm's loss, by the fields of its objective.

        Raises:
            UsageError: one is given that the algorithm does not have.
        """
        recipe = RECIPES[algo]
        given = {name: value for name, value in asdict(self).items() if value is not None}
        flags = {field.name: knob_of(field, Constants).flag(field.name) for field in fields(self)}
        for name in given:
            if name not in recipe.constants:
                those = ", ".join(flags[name] for name in recipe.constants) or "none"
                raise UsageError(f"{flags[name]} means nothing to --algo {algo}; it has: {those}")
        return {**recipe.fixed, **recipe.constants, **given}


@dataclass(frozen=True)
class Advantages:
    """How rewards become advantages; what is None is as the algorithm was published."""

    PANEL: ClassVar[str] = ADVANTAGES

    baseline: Baseline | None = knob(
        None,
        "What is subtracted from a reward: the group's mean, the mean of the others "
        "(leave-one-out), or nothing.",
        shown_default=defaults("baseline"),
    )
    scale: Scale | None = knob(
        None,
        "Divide by the standard deviation of the rewards of the group, or of the batch: all groups "
        "of a step. zscore: of the group as a whole population, a sum over n instead of n - 1.",
        shown_default=defaults("scale"),
    )
    prompts_per_step: int = knob(
        PROMPTS_PER_STEP,
        "Prompts (groups) in an optimizer step; for sft, completions. With --scale batch they are "
        "the batch.",
        minimum=1,
    )
