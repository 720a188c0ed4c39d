"""How a student of few steps is distilled from a diffusion model, of images or of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import knob, knob_of, same
from dlmctl.settings.compute import Seed

Objective = Literal["cd", "ct", "ect", "scd", "sct"]
Solver = Literal["heun", "euler"]
Metric = Literal["l2", "huber"]
Weight = Literal["uniform", "cout"]
Order = Literal["random", "trajectory"]
Divergence = Literal["kl-fwd", "kl-bwd"]

OBJECTIVE, CONSISTENCY = "Objective", "Consistency"
ECT_STAGES = 8
"""Stages of the published recipe of ect, which halves the distance of its two levels after every
3.2 of 25.6 million images; in the last stage r is above 0.98 t."""
GRID, PAIRS, CONTINUOUS = ("cd", "ct"), ("cd", "ct", "ect"), ("scd", "sct")
USES = {
    "solver": ("cd",),
    "scales": GRID,
    "weight": GRID,
    "target_ema": PAIRS,
    "metric": PAIRS,
    "stage_steps": ("ect",),
    "tangent_warmup": CONTINUOUS,
}
"""The objectives that have an option, if not all have it."""
TANGENT_WARMUP = 10
"""The warm-up takes one step in ten of a run (ours); the published one takes 10,000 steps."""


@dataclass(frozen=True)
class Distillation:
    """How a consistency model of images is trained.

    What is given as None takes the default of the objective. Those of cd are the defaults of its
    published code, except the metric, which is a perceptual distance there.
    """

    PANEL: ClassVar[str] = OBJECTIVE

    objective: Objective = knob(
        "cd",
        "cd and scd distil the teacher's ODE; ct, ect and sct need no teacher and learn from the "
        "images. cd and ct compare neighbours on a grid of noise levels, ect two levels that "
        "approach each other in stages; scd and sct go by the derivative (sCM).",
    )
    solver: Solver = knob(None, "How the teacher takes a step, for cd.", shown_default="heun")
    scales: int = knob(
        None, "Points of the grid of noise levels, for cd and ct.", minimum=2, shown_default="40"
    )
    target_ema: float = knob(
        None,
        "Decay of the target network; 0 takes the student itself as the target.",
        minimum=0.0,
        maximum=1.0,
        shown_default="0.95, for ect 0",
    )
    metric: Metric = knob(
        None,
        "Distance from the target: l2 is the mean squared error, huber is pseudo-Huber.",
        "--loss",
        shown_default="l2, for ect huber",
    )
    weight: Weight = knob(
        None,
        "Weight of a pair of levels, for cd and ct: uniform, or cout, 1 / c_out(sigma), with which "
        "errors at small noise count for more (ours).",
        shown_default="uniform",
    )
    sigma_max: float | None = knob(
        None,
        "Largest noise level of the student, from which it samples: at most the teacher's.",
        shown_default="the teacher's",
    )
    stage_steps: int | None = knob(
        None,
        "Steps after which ect halves the distance between its two levels.",
        minimum=1,
        shown_default="an eighth of --steps",
    )
    tangent_warmup: int | None = knob(
        None,
        "Steps in which the part of scd and sct that can be unstable grows to its full share.",
        minimum=1,
        shown_default="a tenth of --steps",
    )
    init: Literal["teacher", "scratch"] = knob("teacher", "Initial weights of the student.")

    def __post_init__(self) -> None:
        for name, objectives in USES.items():
            if getattr(self, name) is not None and self.objective not in objectives:
                option = knob_of(type(self).__dataclass_fields__[name], type(self)).flag(name)
                raise UsageError(f"{option} is not for --objective {self.objective}")
        ect = self.objective == "ect"
        defaults = {
            "solver": "heun",
            "scales": 40,
            "target_ema": 0.0 if ect else 0.95,
            "metric": "huber" if ect else "l2",
            "weight": "uniform",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None and self.objective in USES[name]:
                object.__setattr__(self, name, value)

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective follows a teacher's ODE."""
        return self.objective in ("cd", "scd")

    def steps_per_stage(self, steps: int) -> float:
        """Steps between the stages of ect in a run of this length; may be a fraction."""
        return self.stage_steps or steps / ECT_STAGES


@dataclass(frozen=True)
class GuidedDistillation:
    """How a latent consistency model is distilled from a text-to-image model.

    Defaults are published, except where a help text says so.
    """

    PANEL: ClassVar[str] = OBJECTIVE

    guidance_min: float = knob(
        3.0,
        "Smallest guidance scale of a training step, as diffusers counts it: 1 is none.",
        minimum=1.0,
    )
    guidance_max: float = knob(15.0, "Largest guidance scale of a training step.", minimum=1.0)
    ddim_steps: int = knob(
        50,
        "Timesteps of the teacher's solver; each step skips what lies between two of them, 20 of "
        "1000 for 50.",
        minimum=2,
    )
    metric: Metric = knob("huber", "Distance from the target, element by element.", "--loss")
    huber: float = knob(
        0.001, "Where huber turns from a square to an absolute value.", "--huber-c", minimum=1e-8
    )
    target_ema: float = knob(
        0.95,
        "Decay of the target network; 0 takes the student itself as the target.",
        minimum=0.0,
        maximum=1.0,
    )
    strength_size: int = knob(
        256,
        "Size of the embedding of the guidance scale. Its first weights are 0 (ours).",
        "--guidance-size",
        minimum=4,
    )

    def __post_init__(self) -> None:
        if self.guidance_min > self.guidance_max:
            raise UsageError(
                f"--guidance-min {self.guidance_min:g} is above --guidance-max "
                f"{self.guidance_max:g}"
            )


@dataclass(frozen=True)
class MaskedConsistency:
    """How a language model is distilled: which tokens are masked, and what is compared."""

    order: Order = knob(
        "random",
        "Which tokens stay masked longest: random ones, or those that 'dlmctl rollout' decided "
        "last.",
        panel=CONSISTENCY,
    )
    divergence: Divergence = knob(
        "kl-fwd",
        "KL divergence from target to student, or from student to target.",
        panel=CONSISTENCY,
    )
    certainty: float = knob(
        0.0,
        "Weight of the entropy of the tokens that the student predicts rightly, whose confidence "
        "it raises, so that 'rollout --threshold' decides more of them in a pass (dParallel; its "
        "code has 2, with the mean taken over fewer tokens).",
        minimum=0.0,
        panel=CONSISTENCY,
    )
    decided: int = knob(
        1,
        "Tokens between the two levels in the first round; the number doubles in each round.",
        minimum=1,
        panel=CONSISTENCY,
    )
    rounds: int = knob(
        3,
        "Number of rounds. The target of the first is the teacher; that of each later round is the "
        "student as it was when the round began.",
        minimum=1,
        panel=CONSISTENCY,
    )
    steps_per_round: int = knob(500, "Steps per round.", minimum=1, panel=CONSISTENCY)
    until_eos: bool = knob(
        False,
        "Train on the tokens up to the first end-of-sequence, or on the whole completion.",
        "--until-eos/--all-tokens",
        panel=CONSISTENCY,
    )
    seed: int = same(0, Seed)
