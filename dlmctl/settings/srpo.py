"""How `advantage --algo srpo` gives each token credit by its role."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob
from dlmctl.settings.parsing import number_pair
from dlmctl.settings.rollout import Corruption

CONTRAST, WEIGHTS = "Contrasts (--algo srpo)", "Weights (--algo srpo)"

Signal = Literal["logratio", "k3", "abs-logratio", "full-kl"]
ReasonContrast = Literal["drop", "swap", "blind", "blind-drop"]
SignalBaseline = Literal["traj-mean", "role-mean", "none", "traj-ratio"]
WeightMap = Literal["exp", "softplus", "sigmoid2", "tanh1"]


@dataclass(frozen=True)
class Contrast:
    """What is compared with what; the defaults are ours."""

    PANEL: ClassVar[str] = CONTRAST

    visual_signal: Signal = knob(
        "logratio",
        "Signal of a perception token: its log-probability with the image minus that with the "
        "corrupted image (ours), their k3 as in VPPO, the absolute value, or the divergence of the "
        "whole distributions.",
    )
    reason_signal: Literal["logratio", "k3", "abs-logratio"] = knob(
        "logratio", "The same for a reasoning token, from --reason-contrast (ours: logratio)."
    )
    reason_contrast: ReasonContrast | None = knob(
        None,
        "What reasoning is compared with. drop: the perception left out, which also breaks the "
        "layout, so that any token may become unlikely. swap: the perception of another sample of "
        "the prompt, one that differs if there is one. blind: the image corrupted, which favours "
        "what then stays likely. blind-drop: the perception left out under the corrupted image on "
        "both sides.",
        shown_default="swap; diffusion: drop, which masks the perception in its place",
    )
    corruption: Corruption = knob(
        "blank",
        "Corrupted image: all black (ours), squares of single tokens black, which leaves much to "
        "see where an image has few tokens, Gaussian blur of 6 pixels, noise of deviation 189/255, "
        "the squares in another order, or no image at all.",
        "--corrupt",
    )
    probability: float = knob(
        0.6,
        "Share of the squares that `patch` blackens (PAPO 0.6).",
        "--corrupt-prob",
        minimum=0.0,
        maximum=1.0,
    )
    scope: Literal["prompt", "rollout"] = knob(
        "prompt",
        "One corruption for all samples of a prompt (ours), or one for each.",
        "--corrupt-scope",
    )
    seed: int = knob(0, "Seed of the corruptions.", "--corrupt-seed")

    def of_reasoning(self, diffusion: bool) -> ReasonContrast:
        """What reasoning is compared with, by the kind of the policy if it is not given."""
        return self.reason_contrast or ("drop" if diffusion else "swap")


@dataclass(frozen=True)
class Credit:
    """The map from signals to weights; the defaults are ours."""

    PANEL: ClassVar[str] = WEIGHTS

    signal_baseline: SignalBaseline = knob(
        "traj-mean",
        "What signals are taken relative to: the mean over both roles of the completion (ours, for "
        "the paper's shared baseline), over each role, nothing, or the mean over both as a "
        "divisor.",
        "--credit-baseline",
    )
    weight_map: WeightMap = knob(
        "exp",
        "From signal to weight: exp(x) as in RLSD (ours), softplus(x)/log 2, 2 sigmoid(x), "
        "1 + tanh(x).",
    )
    weight_clip: str = knob(
        "0.2,3",
        "Bounds of the weight, before --weight-norm (RLSD 0.8,1.2, where nearly all weights of "
        "our models stood at a bound).",
        metavar="LOW,HIGH",
    )
    tau: float = knob(
        0.3, "Factor of the signal, per nat; 0 is plain GRPO.", "--weight-tau", minimum=0.0
    )
    strength: float = knob(
        1.0,
        "Share of the weight that follows the signal (RLSD 0.5); 0 is plain GRPO.",
        "--weight-lambda",
        minimum=0.0,
    )
    norm: Literal["none", "mean"] = knob(
        "mean",
        "mean (ours): the weights of the tokens with a role have mean 1, so that they move credit "
        "and do not change the size of the step; none: as they are.",
        "--weight-norm",
    )
    sign_aware: bool = knob(
        False,
        "Turn the signal over if the advantage is negative, as RLSD does.",
        "--sign-aware/--sign-blind",
    )

    def __post_init__(self) -> None:
        low, high = self.clip
        if not 0 < low <= 1 <= high:
            raise UsageError(
                f"--weight-clip {low:g},{high:g} is not LOW,HIGH with 0 < LOW <= 1 <= HIGH"
            )

    @cached_property
    def clip(self) -> tuple[float, float]:
        """Bounds of the weight."""
        return number_pair("--weight-clip", self.weight_clip, "LOW,HIGH such as 0.8,1.2")
