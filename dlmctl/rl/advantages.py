"""Group-relative advantages: how much better a completion is than its prompt's others.

    A_i = r_i - mean_g r                                       group mean      (GRPO, d1, wd1, SPG)
    A_i = (G r_i - sum_g r) / (G - 1)                          leave-one-out   (RLOO, ESPO, GDSD)
    then, on request, divided by std r + eps, over the group or over the batch.

The standard deviation is that of the rewards themselves, unbiased, and eps = 1e-4: TRL's
`scale_rewards`, and that of ESPO and GDSD, whose recipes switch it off. d1, wd1 and SPG have none.
TraceRL divides by the deviation of the group as a whole population, without eps: `zscore`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dlmctl.records.errors import UsageError
from dlmctl.settings.algorithms import PROMPTS_PER_STEP, RECIPES, Algorithm, Baseline, Scale
from dlmctl.settings.objective import Advantages

EPSILON = 1e-4


@dataclass(frozen=True)
class Normalization:
    """How rewards become advantages.

    Raises:
        UsageError: something without a baseline is to be scaled; equal rewards, which have no
            deviation, would be multiplied by 1 / eps.
    """

    baseline: Baseline = "mean"
    scale: Scale = "none"
    prompts_per_step: int = PROMPTS_PER_STEP
    """Groups that are a batch, for the scale of one."""

    def __post_init__(self) -> None:
        if self.baseline == "none" and self.scale != "none":
            raise UsageError(
                f"--scale {self.scale} divides the distance from a baseline, and --baseline none "
                "leaves the reward: leave one of them out"
            )

    @classmethod
    def of(cls, algo: Algorithm, options: Advantages = Advantages()) -> Normalization:
        """That of an algorithm, except for what the options say."""
        recipe = RECIPES[algo]
        return cls(
            options.baseline or recipe.baseline,
            options.scale or recipe.scale,
            options.prompts_per_step,
        )

    def settings(self) -> dict[str, Any]:
        """What an advantage depends on, except the rewards, as a record has it."""
        values = asdict(self)
        if self.scale != "batch":
            del values["prompts_per_step"]
        return values


def advantages(
    rewards: Sequence[Sequence[float]], normalization: Normalization
) -> list[list[float]]:
    """Advantages of each group of a batch of rewards, in the same shape.

    A group of one has advantage 0, and so has a group with equal rewards, unless there is no
    baseline.
    """
    groups = [torch.tensor(group, dtype=torch.float64) for group in rewards]
    whole = _std(torch.cat(groups)) if groups and normalization.scale == "batch" else 0.0
    per_group = []
    for group in groups:
        centred = _centre(group, normalization.baseline)
        if normalization.scale == "zscore":
            centred = centred / (float(group.std(correction=0)) or 1.0)
        elif normalization.scale != "none":
            deviation = whole if normalization.scale == "batch" else _std(group)
            centred = centred / (deviation + EPSILON)
        per_group.append(centred.tolist())
    return per_group


def _centre(group: torch.Tensor, baseline: Baseline) -> torch.Tensor:
    if baseline == "none":
        return group
    if bool((group == group[0]).all()):
        # Exactly zero: rounding of the mean would leave 1e-17 for std to blow up.
        return torch.zeros_like(group)
    centred = group - group.mean()
    return centred * len(group) / (len(group) - 1) if baseline == "loo" else centred


def _std(values: torch.Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0
