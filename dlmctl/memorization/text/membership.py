"""Membership inference: was a text part of what a language model was trained on?

Every attack gives a text a score, which is larger for texts that it takes for members:

    loss     the ELBO per token (for an autoregressive model the log-likelihood)
    ratio    loss less the loss of a reference, a model that has not seen the texts
    zlib     the ELBO divided by the length of the compressed text
    sama     how often the model beats the reference on a few masked tokens of growing masks
             (arXiv 2601.20125)

SAMA masks more and more tokens of a text in S steps, in step k the share

    f_k = f_min + (f_max - f_min) (k + 1) / (S + 1),     k = 0, …, S - 1

takes the loss of the newly masked ones under both models, and draws N subsets of l tokens among all
that are masked by then: score_k is the share of subsets whose summed loss is strictly larger under
the reference, and the score is the mean of score_k with weights 1 / (k + 1).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

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
from dlmctl.report.bootstrap import interval_ends
from dlmctl.settings.memorization import Bootstrap, Method, Sama

F_MIN, F_MAX = 0.05, 0.5
"""Least and greatest share of masked tokens of SAMA."""
SUBSETS = 128
"""N of SAMA."""
FALSE_RATES = (0.1, 0.01, 0.001)
"""False positive rates at which the true one is reported."""


def attack_scores(
    methods: Iterable[Method],
    policy: Policy,
    reference: Policy | None,
    records: Sequence[Record],
    plan: MaskPlan,
    sama: Sama,
    batch_size: int,
) -> dict[str, Tensor]:
    """The scores of all texts by attack, float64 [N] each.

    Args:
        reference: a model that has not seen the texts, for the attacks that need it.
        plan: masks of the ELBO; its seed is also that of sama.
    """
    completions = [example_of(record, policy, plan).completion for record in records]
    lengths = torch.tensor([len(ids) for ids in completions], dtype=torch.float64)
    elbos = likelihoods(policy, records, plan, batch_size)
    scores: dict[str, Tensor] = {}
    for method in methods:
        if method == "loss":
            scores[method] = elbos / lengths
        elif method == "zlib":
            sizes = [compressed_size(policy.decode(ids)) for ids in completions]
            scores[method] = elbos / torch.tensor(sizes, dtype=torch.float64)
        elif method == "ratio" and reference is not None:
            others = likelihoods(reference, records, plan, batch_size)
            scores[method] = (elbos - others) / lengths
        elif reference is not None:
            scores[method] = sama_scores(policy, reference, records, sama, batch_size, plan.seed)
    return scores


def likelihoods(
    policy: Policy, records: Sequence[Record], plan: MaskPlan, batch_size: int
) -> Tensor:
    """The ELBO of each text, summed over its tokens: float64 [N] in nats."""
    examples = [example_of(record, policy, plan) for record in records]
    return elbo_samples(policy, examples, batch_size).mean(1)


def compressed_size(text: str) -> int:
    """Bytes of a text compressed by zlib."""
    return len(zlib.compress(text.encode()))


def shares(steps: int) -> list[float]:
    """f_k, the share of the tokens that SAMA masks in each step."""
    return [F_MIN + (F_MAX - F_MIN) * (k + 1) / (steps + 1) for k in range(steps)]


def sama_scores(
    policy: Policy,
    reference: Policy,
    records: Sequence[Record],
    plan: Sama,
    batch_size: int,
    seed: int = 0,
    subsets: int = SUBSETS,
) -> Tensor:
    """The score of each text, float64 [N] in [0, 1].

    Both models read the same tokens, whose losses are compared one by one.

    Raises:
        UsageError: a model is autoregressive, or the two have different tokenizers.
    """
    for model in (policy, reference):
        if not model.diffusion:
            raise UsageError(f"{model.name} is autoregressive, and sama masks tokens")
    rows = [example_of(record, policy, MaskPlan(samples=2)) for record in records]
    check_same_tokens(policy, reference, (i for r in rows for i in (*r.prompt, *r.completion)))
    keys = [(seed, str(record.get("id", n))) for n, record in enumerate(records)]
    orders = [
        stream_uniform((*key, "order"), len(row.completion)).argsort()
        for row, key in zip(rows, keys, strict=True)
    ]
    losses = [torch.zeros(2, len(row.completion), dtype=torch.float64) for row in rows]
    total = torch.zeros(len(rows), dtype=torch.float64)
    before = [0] * len(rows)
    weights = [1 / (k + 1) for k in range(plan.sama_steps)]
    for k, share in enumerate(shares(plan.sama_steps)):
        counts = [max(1, round(share * len(order))) for order in orders]
        for start in range(0, len(rows), batch_size):
            part = range(start, min(start + batch_size, len(rows)))
            masked = [mask_of(orders[n][: counts[n]], len(orders[n])) for n in part]
            new = [mask_of(orders[n][before[n] : counts[n]], len(orders[n])) for n in part]
            prompts = [rows[n].prompt for n in part]
            completions = [rows[n].completion for n in part]
            for place, model in enumerate((policy, reference)):
                values = token_log_probs(model, prompts, completions, masked, new).double().cpu()
                for at, n in enumerate(part):
                    losses[n][place, new[at]] = -values[at, : len(orders[n])][new[at]]
        for n, order in enumerate(orders):
            masked_losses = losses[n][:, order[: counts[n]]]  # [2, counts[n]]
            total[n] += weights[k] * _wins(masked_losses, plan.sama_tokens, subsets, (*keys[n], k))
        before = counts
    return total / sum(weights)


def _wins(losses: Tensor, tokens: int, subsets: int, key: Sequence[str | int]) -> float:
    """Share of random subsets on which the reference loses more; losses [2, M], ours first."""
    count = losses.shape[1]
    streams = key_tensor([stream_key(*key, j) for j in range(subsets)])
    ranks = uniform(streams[:, None], torch.arange(count)[None]).argsort(1)  # [subsets, M]
    chosen = ranks[:, : min(tokens, count)]
    own, other = losses[0][chosen].sum(1), losses[1][chosen].sum(1)
    return float((other > own).double().mean())


def separation(members: Tensor, others: Tensor, bootstrap: Bootstrap) -> dict[str, object]:
    """How well scores separate members [N] from others [M].

    Returns:
        auc with a bootstrap interval, and the true positive rate at each false positive rate: the
        largest share of members above a threshold that at most this share of others is above.
    """
    generator = torch.Generator().manual_seed(bootstrap.seed)
    resampled = []
    for _ in range(bootstrap.resamples):
        own = members[torch.randint(len(members), (len(members),), generator=generator)]
        rest = others[torch.randint(len(others), (len(others),), generator=generator)]
        resampled.append(_auc(own, rest))
    aucs = torch.tensor(resampled, dtype=torch.float64)
    figures: dict[str, object] = {"auc": _auc(members, others)}
    figures["auc_interval"] = list(interval_ends(aucs, bootstrap.confidence))
    falling = others.sort(descending=True).values
    for rate in FALSE_RATES:
        allowed = int(rate * len(others) + 1e-9)
        threshold = float(falling[allowed]) if allowed < len(others) else -float("inf")
        figures[f"tpr_at_{rate:g}"] = float((members > threshold).double().mean())
    return figures


def roc_curve(members: Tensor, others: Tensor) -> list[dict[str, float | None]]:
    """The ROC curve of scores of members [N] and others [M]: a point for each false positive rate.

    A text that scores strictly above the threshold is taken for a member. Of all thresholds with
    the same false positive rate a point has the lowest, which finds most members.

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
    points: list[dict[str, float | None]] = [
        {"fpr": fpr, "tpr": tpr, "threshold": threshold}
        for fpr, tpr, threshold in zip(false, true, thresholds.tolist(), strict=True)
    ]
    return [*points, {"fpr": 1.0, "tpr": 1.0, "threshold": None}]


def _auc(members: Tensor, others: Tensor) -> float:
    present = torch.zeros(1, len(members) + len(others), dtype=torch.bool)
    present[0, : len(members)] = True
    return float(auroc(torch.cat([members, others])[None], present)[0, 0])
