"""The training loop as a pipe of three processes beside the same stages in one process."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
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
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.settings.sampler import Sampler
from dlmctl.tasks.sources import prompts
from dlmctl.train.checkpoint import latest_checkpoint
from dlmctl.train.run import Run, open_run
from dlmctl.verifiers.registry import verify

DLMCTL = (sys.executable, "-m", "dlmctl")
"""What a stage is started by."""


@dataclass(frozen=True)
class Loop:
    """What a round consists of."""

    model: str
    task: str
    rounds: int
    prompts: int
    samples: int
    batch_size: int
    seed: int
    device: str
    dtype: str


def compare_loops(
    loop: Loop, max_lags: list[int], advance: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """A row for the loop in this process, then one for the pipe with each lag.

    Args:
        advance: is told of each round.

    Yields:
        Dicts with seconds_per_round, the median over all but the first; ratio, to the first row's;
        same, whether the weights at the end are those of the first row.
    """
    base: float | None = None
    weights = b""
    for lag in (None, *max_lags):
        with tempfile.TemporaryDirectory(prefix="dlmctl-loop-") as scratch:
            directory = Path(scratch) / "run"
            steps = in_process(loop, directory) if lag is None else as_pipe(loop, directory, lag)
            times = []
            for _ in steps:
                times.append(time.perf_counter())
                advance()
            found = _weights(directory)
        seconds = statistics.median(b - a for a, b in pairwise(times))
        base, weights = base or seconds, weights or found
        yield {
            "loop": "one process" if lag is None else f"pipe, lag {lag}",
            "rounds": len(times),
            "seconds_per_round": seconds,
            "ratio": seconds / base,
            "same": found == weights,
        }


def in_process(loop: Loop, directory: Path) -> Iterator[dict[str, Any]]:
    """Metrics of every round; samples are drawn from the weights that are trained."""
    run = open_run(
        directory, loop.model, "rspo", Optimizer(), Adapter(), loop.device, loop.dtype, False,
        loop.seed,
    )  # fmt: skip
    verified = verify(_samples(loop, run))
    return update_policy(
        verified,
        run,
        make_objective("rspo"),
        Batching(MaskPlan(seed=loop.seed)),
        loop.prompts,
        loop.batch_size,
        save_every=loop.rounds,
        keep=2,
    )


def _samples(loop: Loop, run: Run) -> Iterator[Record]:
    epochs = (prompts(loop.task, seed=loop.seed + epoch) for epoch in count())
    source = chain.from_iterable(epochs)
    settings = configured(run.policy, Sampler(temperature=0.9))
    for number in range(loop.rounds):
        place = Round(number, loop.prompts * loop.samples, 0)
        batch = list(islice(source, loop.prompts))
        yield from rollout(
            batch, run.policy, settings, loop.samples, loop.seed, loop.batch_size, "fail", place
        )


def as_pipe(loop: Loop, directory: Path, max_lag: int) -> Iterator[bytes]:
    """Metrics lines of `rollout --follow RUN | verify | update -o RUN`.

    Raises:
        CannotWriteError: a stage failed; what it said stands on standard error.
    """
    shared: list[Any] = ["-q", "--batch-size", loop.batch_size, "--seed", loop.seed]
    shared += ["--device", loop.device, "--dtype", loop.dtype, "-m", loop.model]
    sampled = ["--rounds", loop.rounds, "--prompts", loop.prompts, "-n", loop.samples]
    sampled += ["--max-lag", max_lag]
    stages: list[list[Any]] = [
        ["rollout", *shared, *sampled, "--task", loop.task, "--follow", directory],
        ["verify", "-q"],
        ["update", *shared, "-o", directory, "--prompts-per-step", loop.prompts],
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


def _weights(directory: Path) -> bytes:
    checkpoint = latest_checkpoint(directory)
    assert checkpoint is not None
    return (checkpoint / "model.safetensors").read_bytes()
