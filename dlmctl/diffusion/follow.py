"""`rollout --follow`: the sampling half of a training loop that is one shell pipe.

    rollout --follow RUN | verify | update -o RUN

`update` publishes a checkpoint at the end of each round. `rollout` waits for the one that it needs,
loads its weights (or has inference servers load them), and samples the next round. A checkpoint has
the number of rounds that it was trained on, so with lag 0 the samples of round r wait for the
checkpoint with r.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from dlmctl.diffusion.rollout import Round, rollout, with_prompt_ids
from dlmctl.diffusion.sampling import configured
from dlmctl.diffusion.served import ServedSampler
from dlmctl.engines.weightless_policy import served_policy, with_weights_of
from dlmctl.models.allocator import release_cached_memory
from dlmctl.models.loading import load_policy, reload_policy
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import OnError, Record
from dlmctl.records.stdin import reader_is_gone
from dlmctl.settings.compute import QuantizedCompute
from dlmctl.settings.models import Prompting
from dlmctl.settings.rollout import Loop
from dlmctl.settings.sampler import Sampler
from dlmctl.train.run_directory import latest_checkpoint, read_progress

POLL_SECONDS = 0.02


def follow_run(
    prompts: Iterator[Record],
    loop: Loop,
    model: str,
    sampler: Sampler,
    samples: int,
    prompts_per_round: int,
    seed: int,
    compute: QuantizedCompute,
    on_error: OnError,
    prompting: Prompting | None = None,
    served: ServedSampler | None = None,
) -> Iterator[Record]:
    """Sample round after round, each from weights at most `max_lag` rounds old.

    Raises:
        BrokenPipeError: the reader of standard output went away while a checkpoint was awaited.
    """
    assert loop.follow is not None
    device, dtype = compute.device, compute.dtype
    checkpoint = latest_checkpoint(loop.follow)
    first = rounds_done(loop.follow)
    name = str(checkpoint or model)
    if served is None:
        policy = load_policy(name, device, dtype, prompting, compute.quantize)
    else:
        policy = served_policy(name, prompting)
    loaded = checkpoint
    # Prompts of rounds that an earlier process sampled are not sampled again.
    prompts = islice(prompts, first * prompts_per_round, None)
    for number in range(first, loop.rounds):
        checkpoint = _await_round(loop.follow, number - loop.max_lag)
        if checkpoint is not None and checkpoint != loaded:
            if served is None:
                policy = reload_policy(policy, str(checkpoint), device, dtype)
            else:
                policy = with_weights_of(policy, str(checkpoint))
            loaded = checkpoint
        batch = list(islice(prompts, prompts_per_round))
        if not batch:
            return
        # A prompt that cannot be encoded gets no samples, so the round must not wait for them.
        batch = list(with_prompt_ids(batch, policy, on_error))
        sound = sum("error" not in record for record in batch)
        if not sound:
            raise DataError(f"none of the prompts of round {number} can be used: nothing to train")
        place = Round(number, sound * samples, loop.max_lag)
        config = configured(policy, sampler)
        size = compute.batch_size
        yield from rollout(
            batch, policy, config, samples, seed, size, on_error, place, served=served
        )
        release_cached_memory(policy.device)


def rounds_done(run: Path) -> int:
    """Rounds that the newest checkpoint of a run has been trained on."""
    checkpoint = latest_checkpoint(run)
    return read_progress(checkpoint).round if checkpoint else 0


def _await_round(run: Path, wanted: int) -> Path | None:
    """The newest checkpoint, once it has been trained on `wanted` rounds."""
    while True:
        checkpoint = latest_checkpoint(run)
        if wanted <= 0 and checkpoint is None:
            return None
        # If it was pruned between the two reads, the next one exists already.
        there = checkpoint is not None and (checkpoint / "dlmctl.json").exists()
        if checkpoint is not None and there and read_progress(checkpoint).round >= wanted:
            return checkpoint
        if reader_is_gone():
            raise BrokenPipeError
        time.sleep(POLL_SECONDS)
