"""Exact nearest neighbours beside one matrix product of the same size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.memorization.images.neighbours import nearest

CHECKED = 16
"""Samples whose neighbours are compared with those by differences in float64."""
PART = 8192
"""Samples in a part of the product, the same place in memory for each."""


def compare_neighbours(
    samples: int,
    references: int,
    width: int,
    repeats: int,
    memory: int,
    seed: int,
    device: torch.device,
    advance: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """A row for the product of both sets in float32, and one for the two nearest references.

    Both by turns; the first turn is not timed and is for the memory. A tenth of the samples are
    near copies of references, whose distance a squared norm cannot tell.

    Args:
        advance: is told of each turn.

    Yields:
        Dicts with seconds, the median; ratio, to the product's; peak_memory_mb, on top of both
        sets; wrong, of 16 samples those with other neighbours than by differences in float64.
    """
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(references, width, generator=generator).to(device)
    x = torch.randn(samples, width, generator=generator).to(device)
    copies = torch.arange(0, samples, 10, device=device)
    x[copies] = y[copies % references] + 1e-5 * x[copies]
    out = torch.empty(min(PART, samples), references, device=device)

    def product() -> None:
        for part in x.split(PART):
            torch.mm(part, y.T, out=out[: len(part)])

    ways: dict[str, Callable[[], Any]] = {
        "product": product,
        "nearest": lambda: nearest(x, y, 2, memory),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, float | None] = {}
    for turn in range(repeats + 1):
        for name, run in ways.items():
            if not turn:
                with (peak := Peak(device)):
                    run()
                    synchronize(device)
                peaks[name] = peak.megabytes
                advance()
                continue
            begun = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - begun)
            advance()
    base = median(seconds["product"])
    for name, times in seconds.items():
        yield {
            "path": name,
            "seconds": median(times),
            "ratio": median(times) / base,
            "peak_memory_mb": peaks[name],
            "wrong": _wrong(x, y, memory) if name == "nearest" else None,
        }


def _wrong(x: Tensor, y: Tensor, memory: int) -> int:
    """How many of some samples, copies among them, have other neighbours than by differences."""
    some = x[:CHECKED]
    found = nearest(some, y, 2, memory).indices
    wanted = [
        (y.double() - one.double()).square().sum(1).topk(2, largest=False).indices for one in some
    ]
    return int((found != torch.stack(wanted).cpu()).any(1).sum())
