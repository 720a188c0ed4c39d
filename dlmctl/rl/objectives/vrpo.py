"""VRPO: direct preference optimization on ELBO differences (LLaDA 1.5, arXiv 2505.19223).

Every two completions w, l of a prompt with A_w > A_l are a preference pair. With ELBO scores s
under masks that the policy and the reference share:

    L = -mean_(w,l) log sigmoid(beta ((s_w - s_ref_w) - (s_l - s_ref_l)))

Published: a budget of 8 masks, each with a level of its own, shared with the reference. As in the
paper, pairs come from a data set (rl/preferences); or, which is ours, from the group of a prompt.
beta 0.1 is ours too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn.functional import logsigmoid

from dlmctl.rl.objectives.scores import Needs, Scores
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class Vrpo:
    """The objective `vrpo`."""

    beta: float

    recipe: ClassVar[Recipe] = RECIPES["vrpo"]

    @property
    def needs(self) -> Needs:
        return "log_probs"

    @property
    def needs_reference(self) -> bool:
        return True

    def loss(self, scores: Scores) -> Tensor:
        relative = scores.elbo(scores.current - scores.reference)
        winner, loser = preference_pairs(scores)
        margin = relative[winner] - relative[loser]
        return -logsigmoid(self.beta * margin).sum() / max(1, len(winner))

    def metrics(self, scores: Scores) -> dict[str, Any]:
        relative = scores.relative_samples().mean(dim=1)
        winner, loser = preference_pairs(scores)
        right = (relative[winner] > relative[loser]).double()
        return {"pairs": len(winner), "ranked": float(right.mean()) if len(right) else None}


def preference_pairs(scores: Scores) -> tuple[Tensor, Tensor]:
    """Indices of winners and losers, int64 [P] each: all pairs of a prompt that differ."""
    better = scores.advantage[:, None] > scores.advantage[None]
    together = scores.prompt[:, None] == scores.prompt[None]
    winner, loser = (better & together).nonzero(as_tuple=True)
    return winner, loser
