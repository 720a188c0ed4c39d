"""Membership inference: was a text part of what a language model was trained on?

Every attack gives a text a score, larger where it takes the text for a member:

    loss     the ELBO per token (of an autoregressive model the log-likelihood)
    ratio    the same less that of a reference, a model that has not seen the texts
    zlib     the ELBO by the length of the text, compressed
    sama     how often the model beats the reference on a few hidden tokens of growing masks
             (arXiv 2601.20125)

SAMA hides ever more tokens of a text in S steps, the share in step k being

    f_k = f_min + (f_max - f_min) (k + 1) / (S + 1),     k = 0, …, S - 1

takes the loss of the newly hidden ones under both models, and draws N subsets of l tokens among all
that are hidden by then: score_k is the share of subsets with a larger sum under the reference,
strictly, and the score their mean with weights 1 / (k + 1).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import elbo_samples, token_log_probs
from dlmctl.diffusion.noise import key_tensor, stream_key, stream_uniform, uniform
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.memorization.text.extraction import mask_of
from dlmctl.models.policy import Policy, check_same_tokens
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.report.auroc import auroc

Method = Literal["loss", "ratio", "zlib", "sama"]
NEED_REFERENCE = ("ratio", "sama")
FALSE_RATES = (0.1, 0.01, 0.001)
"""False positive rates at which the true one is reported."""


@dataclass(frozen=True)
class Sama:
    """Constants of the published configuration."""

    steps: int = 4
    least: float = 0.05
    most: float = 0.5
    tokens: int = 8
    """l."""
    subsets: int = 128
    """N."""
    seed: int = 0

    def shares(self) -> list[float]:
        """f_k, the share of the tokens that is hidden in each step."""
        spread = self.most - self.least
        return [self.least + spread * (k + 1) / (self.steps + 1) for k in range(self.steps)]


def likelihoods(
    policy: Policy, records: Sequence[Record], plan: MaskPlan, batch_size: int
) -> Tensor:
    """The ELBO of each text's tokens, together: float64 [N] in nats."""
    examples = [example_of(record, policy, plan) for record in records]
    return elbo_samples(policy, examples, batch_size).mean(1)


def compressed_size(text: str) -> int:
    """Bytes of a text behind zlib."""
    return len(zlib.compress(text.encode()))


def sama_scores(
    policy: Policy, reference: Policy, records: Sequence[Record], plan: Sama, batch_size: int
) -> Tensor:
    """The score of each text, float64 [N] in [0, 1].

    Both models read the same tokens, of which the losses are compared one by one.

    Raises:
        UsageError: a model does not denoise, or they have different tokenizers.
    """
    for model in (policy, reference):
        if not model.diffusion:
            raise UsageError(f"{model.name} is autoregressive, and sama hides tokens")
    rows = [example_of(record, policy, MaskPlan(samples=2)) for record in records]
    check_same_tokens(policy, reference, (i for r in rows for i in (*r.prompt, *r.completion)))
    keys = [(plan.seed, str(record.get("id", n))) for n, record in enumerate(records)]
    orders = [
        stream_uniform((*key, "order"), len(row.completion)).argsort()
        for row, key in zip(rows, keys, strict=True)
    ]
    losses = [torch.zeros(2, len(row.completion), dtype=torch.float64) for row in rows]
    total = torch.zeros(len(rows), dtype=torch.float64)
    before = [0] * len(rows)
    weights = [1 / (k + 1) for k in range(plan.steps)]
    for k, share in enumerate(plan.shares()):
        counts = [max(1, round(share * len(order))) for order in orders]
        for start in range(0, len(rows), batch_size):
            part = range(start, min(start + batch_size, len(rows)))
            hidden = [mask_of(orders[n][: counts[n]], len(orders[n])) for n in part]
            new = [mask_of(orders[n][before[n] : counts[n]], len(orders[n])) for n in part]
            prompts = [rows[n].prompt for n in part]
            completions = [rows[n].completion for n in part]
            for place, model in enumerate((policy, reference)):
                values = token_log_probs(model, prompts, completions, hidden, new).double().cpu()
                for at, n in enumerate(part):
                    losses[n][place, new[at]] = -values[at, : len(orders[n])][new[at]]
        for n, order in enumerate(orders):
            found = losses[n][:, order[: counts[n]]]
            total[n] += weights[k] * _wins(found, plan, (*keys[n], k))
        before = counts
    return total / sum(weights)


def _wins(losses: Tensor, plan: Sama, key: Sequence[str | int]) -> float:
    """Share of random subsets on which the reference loses more; losses [2, M], ours first."""
    count = losses.shape[1]
    streams = key_tensor([stream_key(*key, j) for j in range(plan.subsets)])
    ranks = uniform(streams[:, None], torch.arange(count)[None]).argsort(1)
    chosen = ranks[:, : min(plan.tokens, count)]
    own, other = losses[0][chosen].sum(1), losses[1][chosen].sum(1)
    return float((other > own).double().mean())


def separation(members: Tensor, others: Tensor, resamples: int, seed: int) -> dict[str, object]:
    """How well scores tell members [N] from others [M].

    Returns:
        auc with a bootstrap interval of 95 %, and the true positive rate at each false one: the
        largest share of members above a threshold that at most such a share of others is above.
    """
    made: dict[str, object] = {"auc": _auc(members, others)}
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(resamples):
        own = members[torch.randint(len(members), (len(members),), generator=generator)]
        rest = others[torch.randint(len(others), (len(others),), generator=generator)]
        drawn.append(_auc(own, rest))
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    made["auc_interval"] = torch.tensor(drawn, dtype=torch.float64).quantile(ends).tolist()
    falling = others.sort(descending=True).values
    for rate in FALSE_RATES:
        allowed = int(rate * len(others) + 1e-9)
        threshold = float(falling[allowed]) if allowed < len(others) else -float("inf")
        made[f"tpr_at_{rate:g}"] = float((members > threshold).double().mean())
    return made


def roc_curve(members: Tensor, others: Tensor) -> list[dict[str, float | None]]:
    """The ROC curve of scores of members [N] and others [M]: a point for each false positive rate.

    Whoever scores above the threshold, strictly, is taken for a member. Of all thresholds with one
    false positive rate the point has the least, which finds most members.

    Returns:
        Dicts with fpr, tpr and threshold, by rising fpr; the last, of rate 1, has no threshold.
    """
    thresholds = others.unique().flip(0)
    below = [
        torch.searchsorted(scores.sort().values, thresholds, right=True)
        for scores in (others, members)
    ]
    false, true = (
        ((len(scores) - counts).double() / len(scores)).tolist()
        for scores, counts in zip((others, members), below, strict=True)
    )
    made: list[dict[str, float | None]] = [
        {"fpr": fpr, "tpr": tpr, "threshold": threshold}
        for fpr, tpr, threshold in zip(false, true, thresholds.tolist(), strict=True)
    ]
    return [*made, {"fpr": 1.0, "tpr": 1.0, "threshold": None}]


def _auc(members: Tensor, others: Tensor) -> float:
    present = torch.zeros(1, len(members) + len(others), dtype=torch.bool)
    present[0, : len(members)] = True
    return float(auroc(torch.cat([members, others])[None], present)[0, 0])
