"""Variance and bias of ELBO estimators at equal forward passes, on completions of a model.

    dlmctl rollout | python tests/benchmarks/elbo.py

    python tests/benchmarks/elbo.py -m runs/a -k 2,4 --repeats 400 completions.jsonl

From R repetitions of an estimate s_ri of completion i with K masks:

    variance        mean_i var_r s_ri                               nats^2, of one completion
    group_variance  G * mean_g var_r (mean of s_ri over the group)  what the mean of a group of G
                    keeps of it; equal to `variance` if samples have independent masks
    bias            mean of s minus the mean of all unbiased laws, in nats, with standard error
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import torch
from script import script
from torch import Tensor

from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.diffusion.elbo import elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.models.loading import load_policy
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.groups import groups
from dlmctl.records.jsonl import Record, read_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute, Model, Seed
from dlmctl.settings.mask_laws import TOGETHER, UNBIASED, Law
from dlmctl.settings.parsing import whole_numbers
from dlmctl.settings.streams import Files, Json, Quiet

LAWS: tuple[Law, ...] = (*UNBIASED, "quadrature")


def command(
    files: Files = None,
    model: Model = "builtin:puzzles",
    samples: Annotated[
        str,
        Knob("Masks for each completion, one number or more.", "-k", "--masks-per-sample"),
    ] = "2,4,8",
    repeats: Annotated[
        int,
        Knob("Independent estimates that the variance is taken over.", "--repeats", minimum=2),
    ] = 100,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    compute: Compute = Compute(batch_size=256),
) -> None:
    """Variance and bias of the estimators of 'dlmctl score-elbo', at equal forward passes.

    Writes a row for each mask law: variance in nats², its ratio to that of independent t, the
    variance that the mean of a prompt's samples keeps (group_variance: below variance if levels are
    spread over the samples), and the bias. A table on a terminal, JSON in a pipe.
    """
    passes = whole_numbers("-k", samples)
    records = list(read_records(files or [], "fail"))
    if not records:
        raise UsageError("no records came in; nothing to measure on")
    policy = load_policy(model, compute.device, compute.dtype)
    names = ["masks", "passes", "variance", "group_variance", "ratio", "bias", "bias_stderr"]
    total = sum(len(_laws(k)) for k in passes) * repeats
    with counting("estimates", quiet, total) as gauge:
        rows = elbo_variance(
            policy, records, passes, repeats, seed, compute.batch_size, gauge.advance
        )
        write_rows(rows, names, json)


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
        advance: called after each estimate of all records.
    """
    sizes = [len(group) for group in groups(iter(records))]
    for k in passes:
        estimates = {}
        for law in _laws(k):
            plan = MaskPlan(law, k, seed)
            estimates[law] = _estimates(policy, records, plan, repeats, batch_size, advance)
        truth = torch.stack([estimates[law] for law in UNBIASED if law in estimates]).mean()
        baseline = float(estimates["independent"].var(dim=0).mean())
        for law, values in estimates.items():
            variance = float(values.var(dim=0).mean())
            error = values.mean(dim=1) - truth
            yield {
                "masks": law,
                "passes": k,
                "variance": variance,
                "group_variance": _group_variance(values, sizes),
                "ratio": variance / baseline,
                "bias": float(error.mean()),
                "bias_stderr": float(error.std()) / math.sqrt(repeats),
                "completions": len(records),
                "repeats": repeats,
            }


def _laws(passes: int) -> list[Law]:
    """Laws that this number of passes is possible with."""
    return [law for law in LAWS if passes % TOGETHER.get(law, 1) == 0]


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


app = script(command)

if __name__ == "__main__":
    app()
