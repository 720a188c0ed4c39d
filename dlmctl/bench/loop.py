"""The training loop as a pipe of three processes, compared with the same stages in one process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any

from dlmctl.diffusion.rollout import Round, rollout
from dlmctl.diffusion.sampling import configured
from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.records.errors import CannotWriteError
from dlmctl.records.jsonl import Record
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching
from dlmctl.rl.update import update_policy
from dlmctl.settings.bench import Workload
from dlmctl.settings.compute import Compute
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.sampler import SAMPLED
from dlmctl.tasks.sources import prompts
from dlmctl.train.run import open_run
from dlmctl.train.run_directory import latest_checkpoint
from dlmctl.verifiers.registry import verify

DLMCTL = (sys.executable, "-m", "dlmctl")
"""Starts a stage."""


def compare_loops(
    model: str,
    work: Workload,
    compute: Compute,
    max_lags: list[int],
    advance: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """A row for the loop in this process, then one for the pipe with each lag.

    Args:
        advance: called after each round.

    Yields:
        Dicts with seconds_per_round, the median over all but the first; ratio, to the first row's;
        same, whether the final weights equal those of the first row.
    """
    base: float | None = None
    weights = b""
    for lag in (None, *max_lags):
        with tempfile.TemporaryDirectory(prefix="dlmctl-loop-") as scratch:
            directory = Path(scratch) / "run"
            steps: Iterator[Any]
            if lag is None:
                steps = in_process(model, work, compute, directory)
            else:
                steps = as_pipe(model, work, compute, directory, lag)
            times = []
            for _ in steps:
                times.append(time.perf_counter())
                advance()
            checkpoint = latest_checkpoint(directory)
            assert checkpoint is not None
            final = (checkpoint / "model.safetensors").read_bytes()
        seconds = statistics.median(b - a for a, b in pairwise(times))
        base, weights = base or seconds, weights or final
        yield {
            "loop": "one process" if lag is None else f"pipe, lag {lag}",
            "rounds": len(times),
            "seconds_per_round": seconds,
            "ratio": seconds / base,
            "same": final == weights,
        }


def in_process(
    model: str, work: Workload, compute: Compute, directory: Path
) -> Iterator[dict[str, Any]]:
    """Metrics of every round; samples are drawn from the weights that are trained."""
    run = open_run(
        directory, model, "rspo", Optimizer(), Adapter(), compute.device, compute.dtype, False,
        work.seed,
    )  # fmt: skip
    settings = configured(run.policy, SAMPLED)

    def samples() -> Iterator[Record]:
        epochs = (prompts(work.task, seed=work.seed + epoch) for epoch in count())
        source = chain.from_iterable(epochs)
        for number in range(work.rounds):
            yield from rollout(
                list(islice(source, work.prompts)),
                run.policy,
                settings,
                work.samples,
                work.seed,
                compute.batch_size,
                round_=Round(number, work.prompts * work.samples, 0),
            )

    return update_policy(
        verify(samples()),
        run,
        make_objective("rspo"),
        Batching(MaskPlan(seed=work.seed)),
        work.prompts,
        compute.batch_size,
        save_every=work.rounds,
        keep=2,
    )


def as_pipe(
    model: str, work: Workload, compute: Compute, directory: Path, max_lag: int
) -> Iterator[bytes]:
    """Metrics lines of `rollout --follow RUN | verify | update -o RUN`.

    Raises:
        CannotWriteError: a stage failed; its message is on standard error.
    """
    shared: list[Any] = ["-q", "--batch-size", compute.batch_size, "--seed", work.seed]
    shared += ["--device", compute.device, "--dtype", compute.dtype, "-m", model]
    sampled = ["--rounds", work.rounds, "--prompts", work.prompts, "-n", work.samples]
    sampled += ["--max-lag", max_lag]
    stages: list[list[Any]] = [
        ["rollout", *shared, *sampled, "--task", work.task, "--follow", directory],
        ["verify", "-q"],
        ["update", *shared, "-o", directory, "--prompts-per-step", work.prompts],
    ]
    running: list[subprocess.Popen[bytes]] = []
    for stage in stages:
        line = [*DLMCTL, *map(str, stage)]
        source = running[-1].stdout if running else subprocess.DEVNULL
        running.append(subprocess.Popen(line, stdin=source, stdout=subprocess.PIPE))
        if len(running) > 1:
            running[-2].stdout.close()  # type: ignore[union-attr]
    output = running[-1].stdout
    assert output is not None
    try:
        with closing(output):
            yield from output
    finally:
        failed = [process.wait() for process in running]
    if any(failed):
        raise CannotWriteError(f"a stage of the pipe failed, with exit code {max(failed)}")
