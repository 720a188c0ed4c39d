"""What role-aware credit costs: its stage beside the rest of the round, in one process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from dlmctl.bench.loop import Loop
from dlmctl.diffusion.rollout import rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantage_stage import advantage
from dlmctl.rl.advantages import Normalization
from dlmctl.rl.credit_stage import BehaviorPolicy, credited
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching
from dlmctl.rl.update import update_policy
from dlmctl.settings.algorithms import RECIPES
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.sampler import Sampler
from dlmctl.settings.srpo import Contrast, Credit
from dlmctl.tasks.layout import Tags
from dlmctl.tasks.sources import prompts
from dlmctl.train.run import Run, open_run
from dlmctl.verifiers.registry import verify

CREDIT = "advantage --algo srpo"
"""The stage that a round of GRPO does not have."""


def credit_cost(
    plan: Loop, contrast: Contrast, advance: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """A row for each stage of a round, for the round of GRPO, and for that of SRPO.

    Args:
        advance: is told of each round.

    Yields:
        Dicts with seconds, the median over all rounds but the first; ratio, to the round of GRPO;
        scored, the share of the completions whose credit took passes of the model.
    """
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="dlmctl-credit-") as scratch:
        run = open_run(
            Path(scratch) / "run", plan.model, "srpo", Optimizer(), Adapter(), plan.device,
            plan.dtype, False, plan.seed,
        )  # fmt: skip
        scored: list[float] = []
        for part in _rounds(plan, contrast, run, seconds):
            scored.append(part)
            advance()
    taken = {stage: median(times[1:]) for stage, times in seconds.items()}
    plain = sum(spent for stage, spent in taken.items() if stage != CREDIT)
    rows = {**taken, "round of grpo": plain, "round of srpo": plain + taken[CREDIT]}
    for stage, spent in rows.items():
        share = median(scored[1:]) if stage == CREDIT else None
        yield {"stage": stage, "seconds": spent, "ratio": spent / plain, "scored": share}


def _rounds(
    plan: Loop, contrast: Contrast, run: Run, seconds: dict[str, list[float]]
) -> Iterator[float]:
    """The share of scored completions of each round; adds what each stage took to `seconds`."""

    def timed(stage: str, made: Iterable[Record]) -> list[Record]:
        begun = time.perf_counter()
        records = list(made)
        seconds.setdefault(stage, []).append(time.perf_counter() - begun)
        return records

    source, size = prompts(plan.task, seed=plan.seed), plan.batch_size
    recipe = RECIPES["srpo"]
    normalization = Normalization.of("srpo")
    batching = Batching(
        MaskPlan(recipe.law, recipe.samples, until_eos=recipe.until_eos), normalization
    )
    sampler = BehaviorPolicy(plan.model, plan.device, plan.dtype, False)
    for number in range(plan.rounds):
        policy = sampler.policy = run.policy
        settings, seed = configured(policy, Sampler(temperature=1.0)), plan.seed + number
        batch = list(islice(source, plan.prompts))
        records = timed("rollout", rollout(batch, policy, settings, plan.samples, seed, size))
        records = timed("verify", verify(records))
        records = timed("advantage", advantage(records, normalization))
        records = timed(CREDIT, credited(records, sampler, contrast, Credit(), Tags(), size))
        yield sum(record["credit"]["scored"] for record in records) / len(records)
        trained = update_policy(
            records, run, make_objective("srpo"), batching, plan.prompts, size, plan.rounds + 1, 2
        )
        timed("update", map(Record, trained))
