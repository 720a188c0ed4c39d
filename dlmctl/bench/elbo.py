"""Variance and bias of ELBO estimators at equal forward passes, on completions of a model.

For completion i, R repetitions of an estimate from K masks:

    variance        mean_i var_r s_ri                               nats^2, of one completion
    group_variance  G * mean_g var_r (mean of s_ri over the group)  what a group's mean keeps of it;
                    equal to `variance` where samples have independent masks
    bias            mean of s minus the mean of all unbiased laws, in nats, with standard error
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.elbo import elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.policy import Policy
from dlmctl.records.groups import groups
from dlmctl.records.jsonl import Record
from dlmctl.settings.mask_laws import PAIRED, UNBIASED, Law

LAWS: tuple[Law, ...] = (*UNBIASED, "quadrature")


def elbo_variance(
    policy: Policy,
    records: Sequence[Record],
    passes: Sequence[int],
    repeats: int,
    seed: int,
    batch_size: int,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """A row for each number of forward passes and each law; `ratio` is to independent t.

    Args:
        advance: is told of each estimate of all records.
    """
    sizes = [len(group) for group in groups(iter(records))]
    for k in passes:
        found = {}
        for law in _laws(k):
            plan = MaskPlan(law, k, seed)
            found[law] = _estimates(policy, records, plan, repeats, batch_size, advance)
        truth = torch.stack([found[law] for law in UNBIASED if law in found]).mean()
        baseline = float(found["independent"].var(dim=0).mean())
        for law, estimates in found.items():
            variance = float(estimates.var(dim=0).mean())
            away = estimates.mean(dim=1) - truth
            yield {
                "masks": law,
                "passes": k,
                "variance": variance,
                "group_variance": _group_variance(estimates, sizes),
                "ratio": variance / baseline,
                "bias": float(away.mean()),
                "bias_stderr": float(away.std()) / math.sqrt(repeats),
                "completions": len(records),
                "repeats": repeats,
            }


def estimates(passes: Sequence[int], repeats: int) -> int:
    """How many estimates of all records that takes."""
    return sum(len(_laws(k)) for k in passes) * repeats


def _laws(passes: int) -> list[Law]:
    """Those that may have so many passes."""
    return [law for law in LAWS if not (law in PAIRED and passes % 2)]


def _estimates(
    policy: Policy,
    records: Sequence[Record],
    plan: MaskPlan,
    repeats: int,
    batch_size: int,
    advance: Callable[[], None],
) -> Tensor:
    """float64 [R, N]."""
    rows = []
    for draw in range(repeats):
        drawn = dataclasses.replace(plan, draw=draw)
        examples = [example_of(record, policy, drawn) for record in records]
        rows.append(elbo_samples(policy, examples, batch_size).mean(dim=1))
        advance()
    return torch.stack(rows)


def _group_variance(estimates: Tensor, sizes: Sequence[int]) -> float:
    parts = estimates.split(list(sizes), dim=1)
    return sum(float(p.mean(dim=1).var()) * p.shape[1] for p in parts) / len(parts)
