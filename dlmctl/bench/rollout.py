"""Samplers beside LLaDA's plain one: tokens per second, passes, and how many tokens differ."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.bench.reference import plain_sample
from dlmctl.diffusion.sampler import sample_stream
from dlmctl.diffusion.sampling import Request, Sample, SamplerConfig
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.settings.sampler import CacheRule

Judge = Callable[[Sequence[list[int]]], float]
"""Accuracy of the completions of all requests."""


def ways(
    settings: SamplerConfig,
    threshold: float,
    factor: float,
    refresh: int | None,
    refresh_below: float,
) -> dict[str, SamplerConfig]:
    """The sampler's paths by name; `exact` is the one that the others approximate."""

    def way(**changes: Any) -> SamplerConfig:
        return dataclasses.replace(settings, **changes)

    def cached(cache: CacheRule, **changes: Any) -> SamplerConfig:
        return way(cache=cache, refresh=refresh, refresh_below=refresh_below, **changes)

    by_threshold: dict[str, Any] = {"steps": None, "threshold": threshold}
    by_factor: dict[str, Any] = {"steps": None, "factor": factor}
    return {
        "exact": settings,
        "compiled": way(compile=True),
        "threshold": way(**by_threshold),
        "factor": way(**by_factor),
        "prefix": cached("prefix"),
        "dual": cached("dual"),
        "prefix+threshold": cached("prefix", **by_threshold),
        "dual+threshold": cached("dual", **by_threshold),
        "dual+factor": cached("dual", **by_factor),
    }


def compare_samplers(
    policy: Policy,
    requests: Sequence[Request],
    exact: SamplerConfig,
    paths: dict[str, SamplerConfig],
    batch_size: int,
    reference: int,
    judge: Judge | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for the reference, then one for each path.

    Args:
        reference: requests that the plain sampler is run on, evenly spread; it takes one at a time,
            so that its speed does not depend on their number.
        judge: accuracy of completions; rows have none without it.

    Yields:
        Dicts with tokens_per_second; ratio, to the first row's; nfe, forward passes of a
        completion; same, the share of tokens that are the first row's; accuracy; peak_memory_mb,
        on top of what was in use before.
    """
    if not policy.diffusion:
        raise UsageError("bench rollout compares samplers of diffusion models")
    step = max(1, len(requests) // reference) if reference else 1
    chosen = list(range(0, len(requests), step))[:reference]
    base: dict[int, list[int]] = {}
    speed = None
    if chosen:
        plain_sample(policy, requests[0], _short(exact))
        with Peak(policy.device) as peak:
            seconds, tokens = _timed(
                policy, lambda: [plain_sample(policy, requests[n], exact) for n in chosen]
            )
        base = dict(zip(chosen, tokens, strict=True))
        speed = len(chosen) * exact.gen_length / seconds
        whole = judge(tokens) if judge and len(chosen) == len(requests) else None
        passes = exact.blocks * exact.steps_per_block
        yield _row("reference", len(chosen), speed, 1.0, passes, 1.0, whole, seconds, peak)
    for name, settings in paths.items():
        _samples(policy, requests[:batch_size], _short(settings), batch_size)
        with Peak(policy.device) as peak:
            seconds, samples = _timed(
                policy, partial(_samples, policy, requests, settings, batch_size)
            )
        completions = [sample.tokens for sample in samples]
        base = base or dict(enumerate(completions))
        here = len(requests) * exact.gen_length / seconds
        speed = speed or here
        same = sum(a == b for n, t in base.items() for a, b in zip(t, completions[n], strict=True))
        yield _row(
            name,
            len(requests),
            here,
            here / speed,
            sum(sample.nfe for sample in samples) / len(samples),
            same / len(base) / exact.gen_length,
            judge(completions) if judge else None,
            seconds,
            peak,
        )


def _samples(
    policy: Policy, requests: Sequence[Request], settings: SamplerConfig, batch_size: int
) -> list[Sample]:
    return list(sample_stream(policy, requests, settings, batch_size))


def _short(settings: SamplerConfig) -> SamplerConfig:
    """A block, of few steps, to have everything allocated and compiled."""
    length = min(settings.gen_length, settings.block_length)
    steps = None if settings.steps is None else min(2, settings.steps)
    return dataclasses.replace(settings, gen_length=length, steps=steps)


def _timed(policy: Policy, work: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(policy.device)
    start = time.perf_counter()
    result = work()
    synchronize(policy.device)
    return time.perf_counter() - start, result


def _row(
    path: str,
    completions: int,
    speed: float,
    ratio: float,
    nfe: float,
    same: float,
    accuracy: float | None,
    seconds: float,
    peak: Peak,
) -> dict[str, Any]:
    return {
        "path": path,
        "completions": completions,
        "tokens_per_second": speed,
        "ratio": ratio,
        "nfe": nfe,
        "same": same,
        **({} if accuracy is None else {"accuracy": accuracy}),
        "seconds": seconds,
        "peak_memory_mb": peak.megabytes,
    }
