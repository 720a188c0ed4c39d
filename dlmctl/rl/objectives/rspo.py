"""RSPO: the advantage is a target for the relative log-ratio (arXiv 2605.10218, equation 3.3).

For completions i = 1..N of a batch, with ELBO scores s under shared masks, in nats:

    d_i    = s_theta(y_i | x_i) - s_ref(y_i | x_i)                     relative score
    dhat_i = d_i - mean d                                              centred
    w_i    = A_i - lambda * dhat_i                                     detached: residual feedback
    L      = -(1/N) sum_i w_i * dhat_i

The mean is detached, so that the gradient is

    grad L = -(1/N) sum_i w_i (1/K) sum_k grad s_theta^(k)(y_i | x_i)
           = lambda grad (1/N) sum_i (dhat_i - A_i / lambda)^2 / 2

a regression of the centred log-ratio on the target A / lambda. With whole groups sum_i w_i = 0.
lambda = 0 is REINFORCE on the ELBO. Where the weights and the gradient see the same masks, their
product is biased by the covariance of the two over masks; `residual_masks="independent"` forms the
weights from masks of their own, for another K forward passes of each policy.

The paper's lambda is 0.01; whether its score is a sum over the completion or a mean per token could
not be read, so that both are here (`--score-norm`), and `sequence` is our default: a target
A/lambda of a hundred nats can be met by a sequence and not by a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from dlmctl.rl.objectives.scores import Needs, Scores
from dlmctl.settings.algorithms import RECIPES, Recipe

Center = Literal["batch", "prompt"]
ScoreNorm = Literal["sequence", "token"]
ResidualMasks = Literal["shared", "independent"]


@dataclass(frozen=True)
class Rspo:
    """The objective `rspo`."""

    strength: float
    """lambda, per nat."""
    score_norm: ScoreNorm
    center: Center
    residual_masks: ResidualMasks

    recipe: ClassVar[Recipe] = RECIPES["rspo"]

    @property
    def needs(self) -> Needs:
        return "relative" if self.strength > 0 else "nothing"

    @property
    def needs_reference(self) -> bool:
        return self.strength > 0

    def loss(self, scores: Scores) -> Tensor:
        per_score = self._per_score(scores)
        weights = self._residual(scores).weights if self.strength > 0 else scores.advantage
        return -(weights * per_score * scores.elbo(scores.current)).mean()

    def metrics(self, scores: Scores) -> dict[str, Any]:
        if not self.needs_reference:
            return {}
        residual = self._residual(scores)
        nonzero = scores.advantage != 0
        ratio = (residual.feedback[nonzero] / scores.advantage[nonzero]).abs()
        flipped = residual.weights[nonzero] * scores.advantage[nonzero] < 0
        return {
            "feedback_ratio": float(ratio.median()) if len(ratio) else None,
            "flipped": float(flipped.double().mean()) if len(flipped) else None,
        }

    def _residual(self, scores: Scores) -> Residual:
        relative = scores.relative_samples().mean(dim=1) * self._per_score(scores)
        groups = scores.prompt if self.center == "prompt" else None
        return residual_weights(scores.advantage, relative, self.strength, groups)

    def _per_score(self, scores: Scores) -> Tensor:
        return 1 / scores.lengths if self.score_norm == "token" else scores.lengths**0


class Residual(NamedTuple):
    """Weights of a batch and what they are made of; float64 [N] each."""

    weights: Tensor
    """w_i, what the gradient of each score is multiplied with."""
    centred: Tensor
    """dhat_i."""
    feedback: Tensor
    """lambda * dhat_i, the share of the weight that pulls back."""


def residual_weights(
    advantage: Tensor, relative_score: Tensor, strength: float, groups: Tensor | None = None
) -> Residual:
    """The detached weights of RSPO's gradient.

    Args:
        advantage: float64 [N], A_i.
        relative_score: float64 [N], d_i in nats (per sequence or per token, as lambda means it).
        strength: lambda.
        groups: int64 [N], the prompt of each completion (0, 1, …) to centre per prompt; None
            centres over the batch.
    """
    centred = _centre(relative_score, groups)
    feedback = strength * centred
    return Residual(advantage - feedback, centred, feedback)


def rspo_loss(advantage: Tensor, score: Tensor, reference: Tensor, strength: float) -> Tensor:
    """Equation 3.3 as it is written, for scores [N] with gradient."""
    relative = score - reference
    centred = relative - relative.mean().detach()
    weights = (advantage - strength * centred).detach()
    return -(weights * centred).mean()


def _centre(values: Tensor, groups: Tensor | None) -> Tensor:
    if groups is None:
        return values - values.mean()
    sums = values.new_zeros(int(groups.max()) + 1).index_add(0, groups, values)
    return values - (sums / groups.bincount())[groups]
