"""GRPO: PPO's clip on every token, advantages from the group (arXiv 2402.03300); and SRPO.

With token t of completion i in mask k, rho = p / p_old, and the averages of TRL's `loss_type`:

    l_ikt   = -min(rho w_it A_i, clip(rho, 1 - eps, 1 + eps_high) w_it A_i) + beta k3
    l_ikt   = -sg(min(rho, eps_high)) w_it A_i log p + beta k3         cispo (arXiv 2506.13585)
    k3      = p_ref / p - log(p_ref / p) - 1
    l_i     = (1/K) sum_k weight_k sum_{t in M_k} l_ikt

    grpo    (1/N) sum_i l_i / L_i             a mean over completions of means over tokens
    dapo    sum_i l_i / sum_i L_i             a mean over the tokens of the step; bnpo, cispo too
    dr_grpo sum_i l_i / (N C_max)             no completion's own length (arXiv 2503.20783)

For an autoregressive policy K = 1, weight = 1 and M holds every scored token: GRPO as it is known.
For a diffusion policy weight_k / K are those of the ELBO, so that where p = p_old the gradient of
l_i is that of -A_i ELBO_i (each token's term times w_it). bnpo is TRL's mean over the tokens of a
micro-batch; a step is one batch here, whatever --batch-size, so that it is the same as dapo.
With a dual clip C (arXiv 1912.09729) l is at most -C w A where A < 0.

SRPO (arXiv 2605.07274) refines A_i to w_it A_i with token weights w > 0 of the records. They
are constants and positive, so that neither the sign of an advantage nor which tokens are clipped
changes, and the penalty is not weighted. `grpo` has w = 1, whatever weights the records have.

Defaults are TRL's: eps 0.2 both ways, beta 0, dapo, advantages divided by the standard deviation of
the group, one step on a batch; EasyR1 has beta 0.01, eps_high 0.3, C = 3. cispo's bound is 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dlmctl.records.errors import UsageError
from dlmctl.rl.objectives.scores import PenalizedRatios, Scores
from dlmctl.settings.algorithms import CISPO_BOUND, RECIPES, Recipe

LossType = Literal["dapo", "grpo", "bnpo", "dr_grpo", "cispo"]


@dataclass(frozen=True)
class Grpo(PenalizedRatios):
    """The objective `grpo`; token weights of the records are not looked at."""

    loss_type: LossType
    clip: float
    """eps: ratios are clipped at 1 - eps, and at 1 + eps unless `clip_high` is given."""
    clip_high: float | None
    """1 + clip_high is where ratios are clipped above; for cispo, clip_high itself."""
    dual_clip: float | None
    """C > 1; None: no bound."""
    beta: float
    max_length: int | None
    """C_max of dr_grpo in tokens; None: the most that a completion of the batch has."""

    recipe: ClassVar[Recipe] = RECIPES["grpo"]

    def __post_init__(self) -> None:
        if self.max_length is not None and self.loss_type != "dr_grpo":
            raise UsageError(f"--max-length means nothing to --loss-type {self.loss_type}")
        if self.dual_clip is not None and self.loss_type == "cispo":
            raise UsageError("--dual-clip means nothing to --loss-type cispo")

    @property
    def bounds(self) -> tuple[float, float]:
        """Where ratios are clipped."""
        if self.loss_type == "cispo":
            return 0.0, CISPO_BOUND if self.clip_high is None else self.clip_high
        return 1 - self.clip, 1 + (self.clip if self.clip_high is None else self.clip_high)

    def loss(self, scores: Scores) -> Tensor:
        per_token = self._policy_loss(scores)
        if self.beta > 0:
            per_token = per_token + self.beta * _k3(scores)
        counts = scores.targets * scores.weights[:, :, None] / scores.weights.shape[1]
        return self._average((per_token * counts).sum(dim=(1, 2)), scores.lengths)

    def metrics(self, scores: Scores) -> dict[str, Any]:
        ratio = _ratio(scores).detach()
        lower, upper = self.bounds
        advantage = scores.advantage[:, None, None]
        per_token = {
            "clip_low": (ratio < lower) & (advantage < 0),
            "clip_high": (ratio > upper) & (advantage > 0),
            "ratio": ratio,
            **({"k3": _k3(scores).detach()} if self.beta > 0 else {}),
        }
        return {name: _mean(values[scores.targets]) for name, values in per_token.items()}

    def _advantage(self, scores: Scores) -> Tensor:
        """Of each token, [N, 1, 1] or [N, 1, G]."""
        return scores.advantage[:, None, None]

    def _policy_loss(self, scores: Scores) -> Tensor:
        """[N, K, G]."""
        ratio, advantage = _ratio(scores), self._advantage(scores)
        lower, upper = self.bounds
        clipped = ratio.clamp(lower, upper)
        if self.loss_type == "cispo":
            return -clipped.detach() * advantage * scores.current
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        if self.dual_clip is None:
            return loss
        bound = -self.dual_clip * advantage
        return torch.where(advantage < 0, torch.minimum(loss, bound), loss)

    def _average(self, sums: Tensor, lengths: Tensor) -> Tensor:
        """The loss, from the sums [N] over the tokens of completions."""
        if self.loss_type == "grpo":
            return (sums / lengths).mean()
        if self.loss_type == "dr_grpo":
            return sums.mean() / (self.max_length or float(lengths.max()))
        return sums.sum() / lengths.sum()


@dataclass(frozen=True)
class Srpo(Grpo):
    """The objective `srpo`; every record has the weights of its tokens."""

    recipe: ClassVar[Recipe] = RECIPES["srpo"]

    def metrics(self, scores: Scores) -> dict[str, Any]:
        size = scores.advantage.abs()[:, None, None].expand_as(scores.current)[scores.targets]
        weight = scores.token_weights[:, None].expand_as(scores.current)[scores.targets]
        total = float(size.sum())
        return {
            **super().metrics(scores),
            "weight": _mean(weight),
            "adv_abs_ratio": float((size * weight).sum()) / total if total else None,
        }

    def _advantage(self, scores: Scores) -> Tensor:
        return scores.advantage[:, None, None] * scores.token_weights[:, None]


def _ratio(scores: Scores) -> Tensor:
    return (scores.current - scores.old).exp()


def _k3(scores: Scores) -> Tensor:
    """Schulman's estimate of the KL divergence to the reference, [N, K, G] >= 0."""
    away = scores.reference - scores.current
    return away.exp() - away - 1


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None
