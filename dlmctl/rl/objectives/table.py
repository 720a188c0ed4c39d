"""The objective of each algorithm of `update --algo`; settings/algorithms has their constants."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dlmctl.rl.objectives.diffu_grpo import DiffuGrpo
from dlmctl.rl.objectives.espo import Espo
from dlmctl.rl.objectives.gdsd import Gdsd
from dlmctl.rl.objectives.grpo import Grpo, Srpo
from dlmctl.rl.objectives.rspo import Rspo
from dlmctl.rl.objectives.scores import Objective
from dlmctl.rl.objectives.spg import Spg
from dlmctl.rl.objectives.vrpo import Vrpo
from dlmctl.rl.objectives.wd1 import Wd1
from dlmctl.settings.algorithms import Reinforcement, constants

OBJECTIVES: Mapping[Reinforcement, type[Any]] = {
    "rspo": Rspo,
    "reinforce": Rspo,
    "diffu-grpo": DiffuGrpo,
    "wd1": Wd1,
    "espo": Espo,
    "spg": Spg,
    "gdsd": Gdsd,
    "vrpo": Vrpo,
    "grpo": Grpo,
    "srpo": Srpo,
}


def make_objective(algo: Reinforcement, **given: Any) -> Objective:
    """The objective of an algorithm; options that are None have their published values.

    Raises:
        UsageError: the algorithm has no such option.
    """
    objective: Objective = OBJECTIVES[algo](**constants(algo, **given))
    return objective
