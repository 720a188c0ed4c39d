"""TraceRL: PPO's clip on the steps that the sampler took (arXiv 2509.06949).

A row is one step of a completion, or `shrink` neighbouring ones: what was still masked before it is
masked, and its targets are the n_r tokens that it decided. With R rows in the batch, ratios
rho = p / p_old and the advantage A_r of the row's completion:

    L  = -(1/R) sum_r (1/n_r) sum_t min(rho_rt A_r, clip(rho_rt, 1 - eps, 1 + eps) A_r)
         + beta (1/R) sum_r sum_t k3_rt
    k3 = p_old / p - log(p_old / p) - 1

The penalty is towards the policy that sampled, not to a reference, and it is a sum over the tokens
of a row where the surrogate is a mean, as in the released code (train/rl_llada.py). Masks of other
laws are rows in the same way; the code calls them random_masking and coupled.

Published for LLaDA: eps 0.2, beta 0.01, shrink 8, rewards normalized by the population's standard
deviation, prompts left out unless between 0.2 and 0.8 of their completions are right (here: unless
they differ). A completion ends before its first <|endoftext|> there (`post_num` 0), here with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dlmctl.rl.objectives.scores import Needs, Scores, clipped_share, clipped_surrogate
from dlmctl.settings.algorithms import RECIPES, Recipe


@dataclass(frozen=True)
class TraceRl:
    """The objective `tracerl`."""

    clip: float
    beta: float

    recipe: ClassVar[Recipe] = RECIPES["tracerl"]

    @property
    def needs(self) -> Needs:
        return "ratios"

    @property
    def needs_reference(self) -> bool:
        return False

    def loss(self, scores: Scores) -> Tensor:
        counts = scores.targets.sum(dim=2)  # [N, K], n_r; 0 in rows that are none
        rows = (counts > 0).sum().clamp(min=1)
        ratio = (scores.current - scores.old).exp()
        surrogate = clipped_surrogate(ratio, scores.advantage[:, None, None], self.clip)
        means = (surrogate * scores.targets).sum(dim=2) / counts.clamp(min=1)
        loss = -means.sum() / rows
        if self.beta > 0:
            loss = loss + self.beta * _k3(scores)[scores.targets].sum() / rows
        return loss

    def metrics(self, scores: Scores) -> dict[str, Any]:
        ratio = (scores.current - scores.old).exp().detach()
        advantage = scores.advantage[:, None, None].expand_as(ratio)
        share = clipped_share(ratio[scores.targets], advantage[scores.targets], self.clip)
        k3 = _k3(scores).detach()[scores.targets]
        return {"clipped": share, "k3": float(k3.mean()) if k3.numel() else None}


def _k3(scores: Scores) -> Tensor:
    """Estimate of the KL divergence to the policy that sampled, [N, K, G] >= 0."""
    away = scores.old - scores.current
    return away.exp() - away - 1
