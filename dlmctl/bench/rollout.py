"""Samplers compared with LLaDA's plain one: tokens per second, passes, tokens that differ."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.bench.reference import plain_sample
from dlmctl.diffusion.sampler import sample_stream
from dlmctl.diffusion.sampling import Request, SamplerConfig, configured
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.settings.bench import SamplerPaths
from dlmctl.verifiers.registry import verify

Accuracy = Callable[[Sequence[list[int]]], float]
"""Accuracy of the completions of all requests."""


def sampler_paths(policy: Policy, options: SamplerPaths) -> dict[str, SamplerConfig]:
    """The sampler's paths by name; `exact` is the one that the others approximate."""
    exact = configured(policy, options.exact)
    threshold: dict[str, Any] = {"steps": None, "threshold": options.threshold}
    factor: dict[str, Any] = {"steps": None, "factor": options.factor}
    renewal = {"refresh": options.refresh, "refresh_below": options.refresh_below}
    prefix: dict[str, Any] = {"cache": "prefix", **renewal}
    dual: dict[str, Any] = {"cache": "dual", **renewal}
    uncached: dict[str, Any] = {"cache": "none"}
    changes: dict[str, dict[str, Any]] = {
        "exact": {},
        "compiled": {"compile": True, **uncached},
        "random": {"remasking": "random"},
        "threshold": threshold,
        "factor": factor,
    }
    changes |= (
        {"uncached": uncached}
        if policy.blocks
        else {
            "prefix": prefix,
            "dual": dual,
            "prefix+threshold": {**prefix, **threshold},
            "dual+threshold": {**dual, **threshold},
            "dual+factor": {**dual, **factor},
        }
    )
    return {name: dataclasses.replace(exact, **change) for name, change in changes.items()}


def usual_paths(policy: Policy) -> str:
    """The paths that are measured if none are named."""
    return "uncached,exact,threshold" if policy.blocks else "exact,dual,dual+threshold,dual+factor"


def compare_samplers(
    policy: Policy,
    requests: Sequence[Request],
    exact: SamplerConfig,
    paths: dict[str, SamplerConfig],
    batch_size: int,
    reference: int,
    accuracy: Accuracy | None = None,
) -> Iterator[dict[str, Any]]:
    """A row for the reference, then one for each path.

    Args:
        reference: number of requests that the plain sampler runs on, evenly spread; it takes one at
            a time, so that its speed does not depend on their number. A block-causal model has no
            such row.
        accuracy: rows have no accuracy if this is None.

    Yields:
        Dicts with tokens_per_second; ratio, to the first row's; nfe, forward passes of a
        completion; same, the share of tokens that equal the first row's; accuracy; peak_memory_mb,
        on top of what was in use before.

    Raises:
        UsageError: the model is autoregressive.
    """
    if not policy.diffusion:
        raise UsageError("bench rollout compares samplers of diffusion models")
    reference = 0 if policy.blocks else reference
    every = max(1, len(requests) // reference) if reference else 1
    chosen = list(range(0, len(requests), every))[:reference]

    def run_plain(config: SamplerConfig) -> tuple[dict[int, list[int]], float]:
        tokens = {n: plain_sample(policy, requests[n], config) for n in chosen}
        return tokens, config.blocks * config.steps_per_block

    def run_path(config: SamplerConfig) -> tuple[dict[int, list[int]], float]:
        samples = list(sample_stream(policy, requests, config, batch_size))
        tokens = {n: sample.tokens for n, sample in enumerate(samples)}
        return tokens, sum(sample.nfe for sample in samples) / len(samples)

    first: dict[int, list[int]] = {}
    speed = None
    for name, config in {**({"reference": exact} if chosen else {}), **paths}.items():
        run = run_plain if name == "reference" else run_path
        if name == "reference":
            plain_sample(policy, requests[0], _warm_up(config))
        else:
            list(sample_stream(policy, requests[:batch_size], _warm_up(config), batch_size))
        with Peak(policy.device) as peak:
            synchronize(policy.device)
            start = time.perf_counter()
            completions, nfe = run(config)
            synchronize(policy.device)
            seconds = time.perf_counter() - start
        first = first or completions
        here = len(completions) * exact.gen_length / seconds
        speed = speed or here
        pairs = (pair for n in first for pair in zip(first[n], completions[n], strict=True))
        record = {
            "path": name,
            "completions": len(completions),
            "tokens_per_second": here,
            "ratio": here / speed,
            "nfe": nfe,
            "same": sum(a == b for a, b in pairs) / len(first) / exact.gen_length,
            "seconds": seconds,
            "peak_memory_mb": peak.megabytes,
        }
        if accuracy and len(completions) == len(requests):
            record["accuracy"] = accuracy(list(completions.values()))
        yield record


def accuracy_of(records: Sequence[Record], policy: Policy) -> Accuracy:
    """The share of completions that the verifiers of the records' tasks accept."""

    def accuracy(completions: Sequence[list[int]]) -> float:
        answered: list[Any] = []
        for record, tokens in zip(records, completions, strict=True):
            done = Record(record)
            done.where = record.where
            done["completion"] = policy.decode(tokens)
            answered.append(done)
        rewards = [record["reward"] for record in verify(answered)]
        return sum(reward >= 1.0 for reward in rewards) / len(rewards)

    return accuracy


def _warm_up(config: SamplerConfig) -> SamplerConfig:
    """One block of few steps, to allocate and compile everything."""
    length = min(config.gen_length, config.block_length)
    steps = None if config.steps is None else min(2, config.steps)
    return dataclasses.replace(config, gen_length=length, steps=steps)
