"""How a training run goes: model, directory, steps on a batch, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from dlmctl.records.errors import UsageError
from dlmctl.settings import Knob, knob, same
from dlmctl.settings.algorithms import defaults
from dlmctl.settings.objective import OBJECTIVE
from dlmctl.settings.optimizer import ADAPTER, GradientCheckpointing

OptionalModel = Annotated[
    str | None,
    Knob(
        "Model to begin from, which is also the reference. A run that exists resumes from its own "
        "checkpoint.",
        "-m",
        "--model",
        metavar="MODEL",
        env=True,
        shown_default="the model that the records were sampled from",
    ),
]
RunOutput = Annotated[
    Path | None,
    Knob(
        "Directory of the run: checkpoints, the link 'latest', metrics.jsonl.",
        "-o",
        "--output",
        metavar="RUN",
        shown_default="the next free runs/ALGO-N",
    ),
]
ResumeInput = Annotated[
    bool,
    Knob(
        "Resume in the input too, which is the whole of it again: leave out what the run's newest "
        "checkpoint was trained on. Without this option all that comes in is new.",
        "--resume",
    ),
]

TRACKERS = ("trackio", "wandb", "tensorboard", "mlflow")
Log = Annotated[
    list[str] | None,
    Knob(
        f"Send the metrics to a tracker too, by its own client: {', '.join(TRACKERS)}; repeatable, "
        "or a list with commas. A run that resumes continues the same tracked run. Where to is "
        "what the variables of the tracker say, such as WANDB_MODE or MLFLOW_TRACKING_URI.",
        "--log",
        metavar="TRACKER",
        shown_default="metrics.jsonl alone",
    ),
]


@dataclass(frozen=True)
class Learning:
    """What is done with a batch."""

    inner: int | None = knob(
        None,
        "Optimizer steps on a batch, each with masks of its own.",
        minimum=1,
        panel=OBJECTIVE,
        shown_default=defaults("inner"),
    )
    drop_zero_adv: bool | None = knob(
        None,
        "Leave out completions with advantage 0. RSPO learns from them: they pull back to the "
        "reference.",
        "--drop-zero-adv/--keep-zero-adv",
        panel=OBJECTIVE,
        shown_default=defaults("drop_zero_adv", {True: "drop-zero-adv", False: "keep-zero-adv"}),
    )
    any_policy: bool = knob(
        False,
        "Train on records of 'rollout --follow' whatever weights they were sampled from, instead "
        "of refusing those that this run did not have.",
        "--any-policy/--own-policy",
    )
    credit_cosine: int | None = knob(
        None,
        "For srpo: every EVERY steps, `gradient_cosine` says how close the gradient is to the one "
        "without token weights (1: the weights change its length alone). Such a step takes a "
        "second backward pass.",
        metavar="EVERY",
        minimum=1,
        panel=OBJECTIVE,
        shown_default="off",
    )
    gradient_checkpointing: bool = same(False, GradientCheckpointing)
    compile: bool = knob(
        False,
        "Run the model's layers through torch.compile: the same up to rounding, and faster after "
        "the first steps, which compile for a minute. Of one process.",
        "--compile",
        panel=ADAPTER,
    )


@dataclass(frozen=True)
class Saving:
    """Checkpoints of a run."""

    save_every: int = knob(100, "Steps between checkpoints within a round.", minimum=1)
    keep: int = knob(2, "How many checkpoints are kept.", minimum=1)
    keep_samples: str | None = knob(
        None,
        "Keep K completions of each N-th round in RUN/samples.jsonl, for 'dlmctl view --html FILE "
        "RUN'; without rounds, of each N-th step. At most of 32 rounds, then of fewer.",
        metavar="N:K",
        shown_default="off",
    )

    def samples(self) -> tuple[int, int] | None:
        """N and K of `keep_samples`; raises UsageError for another form."""
        if self.keep_samples is None:
            return None
        every, _, count = self.keep_samples.partition(":")
        sound = all(part.isascii() and part.isdigit() and int(part) for part in (every, count))
        if not sound:
            raise UsageError(f"--keep-samples {self.keep_samples} is not N:K, as 10:4")
        return int(every), int(count)


@dataclass(frozen=True)
class Evaluating:
    """Held-out evaluation of checkpoints, and the best one by it."""

    PANEL: ClassVar[str] = "Evaluation"

    eval: str | None = knob(
        None,
        "Shell pipe that evaluates a checkpoint on prompts that are not trained on. DLMCTL_MODEL, "
        "which every --model reads, names the checkpoint, and records come out of the pipe. The "
        "mean goes into metrics.jsonl, and RUN/best is a link to the best checkpoint, which is "
        "kept. What the run begins with is evaluated first.",
        metavar="COMMAND",
        shown_default="none",
    )
    eval_every: int = knob(
        1,
        "Steps from an evaluation to the next one, at the checkpoint that comes then.",
        minimum=1,
        shown_default="each checkpoint",
    )
    eval_measure: str = knob(
        "reward",
        "Number of each record that is averaged, with dots for a field within a field.",
        metavar="FIELD",
    )
    eval_goal: Literal["highest", "lowest"] = knob("highest", "Which mean is the best.")
    patience: int | None = knob(
        None,
        "End the training after this many evaluations in a row that are no better than the best.",
        minimum=1,
        shown_default="never",
    )

    def __post_init__(self) -> None:
        given = any(getattr(self, field.name) != field.default for field in fields(self))
        if given and self.eval is None:
            raise UsageError("--patience and --eval-… need --eval, the command that evaluates")
