"""d2-StepMerge: diffu-GRPO's loss on the steps that the sampler took (arXiv 2509.21474).

The steps are cut into N segments of as many steps. A token is scored once, with all tokens masked
that were masked when its segment began, and some of the prompt as well; the loss is that of
diffu-GRPO, PPO's clip and k3 to the reference, averaged over the tokens of the batch.

Published: N 8 for the 128 steps of GSM8K and 16 for the 64 of Sudoku and Countdown, which is shrink
16 and 4 here; eps 0.5, beta 0.04, prompt mask 0.15, one for all segments, 12 inner steps (Sudoku
and Countdown: 8). d2-AnyOrder, for models that decode in any order, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlmctl.rl.objectives.diffu_grpo import DiffuGrpo
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class D2(DiffuGrpo):
    """The objective `d2`."""

    recipe: ClassVar[Recipe] = RECIPES["d2"]
