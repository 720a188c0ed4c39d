"""What role-aware credit costs: its stage compared with the rest of the round, in one process.

    python tests/benchmarks/credit.py -m runs/shapes/base

`--help` lists the options and describes the rows.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from script import script

from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
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
from dlmctl.settings import Knob
from dlmctl.settings.algorithms import RECIPES
from dlmctl.settings.bench import Workload
from dlmctl.settings.compute import Compute
from dlmctl.settings.layout import Tags
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.sampler import Sampler
from dlmctl.settings.srpo import Contrast, Credit
from dlmctl.settings.streams import Json, Quiet
from dlmctl.tasks.sources import prompts
from dlmctl.train.run import Run, open_run
from dlmctl.verifiers.registry import verify

CREDIT = "advantage --algo srpo"
"""The stage that a round of GRPO does not have."""


def command(
    model: Annotated[
        str,
        Knob(
            "A model that answers in the layout; a completion without the layout is never scored.",
            "-m",
            "--model",
            metavar="MODEL",
        ),
    ],
    work: Workload = Workload("shapes", rounds=6, prompts=16, samples=8),
    compute: Compute = Compute(batch_size=128),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """What the weights of SRPO cost, compared with a round of GRPO.

    Runs rollout, verify, advantage, advantage --algo srpo and update in this process, with their
    defaults and temperature 1. Writes for each stage, and for the round without and with the
    weights: seconds, the median over the rounds; ratio to the round without; and the share of the
    completions that were scored.
    """
    with counting("rounds", quiet, work.rounds) as gauge:
        rows = credit_cost(model, work, compute, gauge.advance)
        write_rows(rows, ["stage", "seconds", "ratio", "scored"], json)


def credit_cost(
    model: str, work: Workload, compute: Compute, advance: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """A row for each stage of a round, for the round of GRPO, and for that of SRPO.

    Args:
        advance: called after each round.

    Yields:
        Dicts with seconds, the median over all rounds but the first; ratio, to the round of GRPO;
        scored, the share of the completions whose credit took passes of the model.
    """
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="dlmctl-credit-") as scratch:
        run = open_run(
            Path(scratch) / "run", model, "srpo", Optimizer(), Adapter(), compute.device,
            compute.dtype, False, work.seed,
        )  # fmt: skip
        scored: list[float] = []
        for share in _rounds(model, work, compute, run, seconds):
            scored.append(share)
            advance()
    taken = {stage: median(times[1:]) for stage, times in seconds.items()}
    plain = sum(spent for stage, spent in taken.items() if stage != CREDIT)
    rows = {**taken, "round of grpo": plain, "round of srpo": plain + taken[CREDIT]}
    for stage, spent in rows.items():
        share = median(scored[1:]) if stage == CREDIT else None
        yield {"stage": stage, "seconds": spent, "ratio": spent / plain, "scored": share}


def _rounds(
    model: str, work: Workload, compute: Compute, run: Run, seconds: dict[str, list[float]]
) -> Iterator[float]:
    """The share of scored completions of each round; appends each stage's time to `seconds`."""

    def timed(stage: str, results: Iterable[Record]) -> list[Record]:
        begun = time.perf_counter()
        records = list(results)
        seconds.setdefault(stage, []).append(time.perf_counter() - begun)
        return records

    source, size = prompts(work.task, seed=work.seed), compute.batch_size
    recipe = RECIPES["srpo"]
    normalization = Normalization.of("srpo")
    batching = Batching(
        MaskPlan(recipe.law, recipe.samples, until_eos=recipe.until_eos), normalization
    )
    sampler = BehaviorPolicy(model, compute.device, compute.dtype, False)
    for number in range(work.rounds):
        policy = sampler.policy = run.policy
        settings, seed = configured(policy, Sampler(temperature=1.0)), work.seed + number
        batch = list(islice(source, work.prompts))
        records = timed("rollout", rollout(batch, policy, settings, work.samples, seed, size))
        records = timed("verify", verify(records))
        records = timed("advantage", advantage(records, normalization))
        records = timed(CREDIT, credited(records, sampler, Contrast(), Credit(), Tags(), size))
        yield sum(record["credit"]["scored"] for record in records) / len(records)
        trained = update_policy(
            records, run, make_objective("srpo"), batching, work.prompts, size, work.rounds + 1, 2
        )
        timed("update", map(Record, trained))


app = script(command)

if __name__ == "__main__":
    app()
