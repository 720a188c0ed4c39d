"""The algorithms of `update --algo`: each an objective with the recipe it was published with."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dlmctl.records.errors import UsageError
from dlmctl.rl.diffu_grpo import DiffuGrpo
from dlmctl.rl.espo import Espo
from dlmctl.rl.gdsd import Gdsd
from dlmctl.rl.grpo import Grpo, Srpo
from dlmctl.rl.rspo import Rspo
from dlmctl.rl.scores import Objective
from dlmctl.rl.spg import Spg
from dlmctl.rl.vrpo import Vrpo
from dlmctl.rl.wd1 import Wd1

ALGORITHMS: dict[str, type[Any]] = {
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

FIXED: dict[str, dict[str, Any]] = {"reinforce": {"strength": 0.0, "residual_masks": "shared"}}
"""What an algorithm does not leave open."""

OPTIONS = {
    "strength": "--lambda",
    "score_norm": "--score-norm",
    "center": "--center",
    "residual_masks": "--residual-masks",
    "loss_type": "--loss-type",
    "clip": "--clip",
    "clip_high": "--clip-high",
    "dual_clip": "--dual-clip",
    "beta": "--beta",
    "psi": "--psi",
    "omega": "--omega",
    "max_length": "--max-length",
}


def make_objective(algo: str, **given: Any) -> Objective:
    """The objective of an algorithm; options that are None have its published value.

    Raises:
        UsageError: the algorithm has no such option.
    """
    kind, fixed = ALGORITHMS[algo], FIXED.get(algo, {})
    known = {field.name for field in fields(kind)} - set(fixed)
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in known:
            own = ", ".join(OPTIONS[field] for field in OPTIONS if field in known) or "none"
            raise UsageError(f"{OPTIONS[name]} means nothing to --algo {algo}; it has: {own}")
    objective: Objective = kind(**fixed, **chosen)
    return objective
