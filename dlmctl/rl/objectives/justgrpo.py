"""JustGRPO: GRPO with the likelihood of a left-to-right decoder (arXiv 2601.15165).

Completions are sampled one token after the other (--block-length 1), and token t is scored with all
tokens from t on masked, which is its exact probability under this decoder. With the N completions
whose advantage is not 0, and a canvas of C tokens:

    L = -(1/(N C)) sum_i sum_t min(rho_it A_i, clip(rho_it, 1 - eps, 1 + eps) A_i)

the average dr_grpo of `grpo`, over all C tokens, those after the end among them. Published: eps
0.2, no penalty, advantages divided by the group's standard deviation, 16 completions for a prompt.
The released code (grpo.py) takes one step on a batch, where rho = 1, and scores all C positions.
A random choice of them, with -k, is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dlmctl.rl.objectives.grpo import Grpo
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class JustGrpo(Grpo):
    """The objective `justgrpo`."""

    recipe: ClassVar[Recipe] = RECIPES["justgrpo"]
