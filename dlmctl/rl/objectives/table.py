"""The objective of an algorithm of `update --algo`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from dlmctl.rl.objectives.scores import Objective
from dlmctl.settings.algorithms import RECIPES, Reinforcement
from dlmctl.settings.objective import Constants


def objective_class(algo: Reinforcement) -> type[Any]:
    """The class that the table of algorithms names."""
    module, _, name = (RECIPES[algo].objective or "").partition(":")
    objective: type[Any] = getattr(import_module(f"dlmctl.rl.objectives.{module}"), name)
    return objective


def make_objective(algo: Reinforcement, **constants: Any) -> Objective:
    """The objective of an algorithm; constants that are None have their published values.

    Raises:
        UsageError: the algorithm has no such constant.
    """
    objective: Objective = objective_class(algo)(**Constants(**constants).of(algo))
    return objective
