"""Exact nearest neighbours, as in `dlmctl memo-eval`, compared with one matrix product.

    python tests/benchmarks/neighbours.py

    python tests/benchmarks/neighbours.py -n 50000 --references 50000 --memory 4G

`--help` lists the options and describes the rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Annotated, Any

import torch
from script import script
from torch import Tensor

from dlmctl.bench.memory import Peak, synchronize
from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.memorization.images.neighbours import nearest
from dlmctl.models.loading import resolve_device
from dlmctl.settings import Knob
from dlmctl.settings.compute import Memory, Seed
from dlmctl.settings.parsing import byte_count
from dlmctl.settings.streams import Json, Quiet

CHECKED = 16
"""Samples whose neighbours are compared with those by differences in float64."""
PART = 8192
"""Samples in a part of the product; all parts share one output buffer."""


def command(
    samples: Annotated[int, Knob("Vectors.", "-n", "--samples", minimum=1)] = 4000,
    references: Annotated[int, Knob("Vectors to search.", "--references", minimum=2)] = 4000,
    width: Annotated[int, Knob("Numbers in a vector; 3 x 32 x 32.", "--width", minimum=1)] = 3072,
    repeats: Annotated[
        int, Knob("Timed turns, after one that is not timed.", "--repeats", minimum=1)
    ] = 3,
    memory: Memory = "512M",
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    device: Annotated[
        str, Knob("auto, cpu, cuda or cuda:N.", "--device", metavar="DEVICE", env=True)
    ] = "auto",
) -> None:
    """Exact nearest neighbours, as in 'dlmctl memo-eval', compared with one matrix product.

    Writes a row for the product in float32 and one for the two nearest neighbours: seconds, the
    median over turns taken alternately; ratio to the product; peak memory in megabytes, on top of
    both sets; and how many of 16 samples, near copies among them, have other neighbours than
    differences in float64 give.
    """
    size, where = byte_count("--memory", memory), resolve_device(device)
    with counting("turns", quiet, 2 * (repeats + 1)) as gauge:
        rows = compare_neighbours(
            samples, references, width, repeats, size, seed, where, gauge.advance
        )
        write_rows(rows, ["path", "seconds", "ratio", "peak_memory_mb", "wrong"], json)


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

    The two take turns; the first turn measures memory and is not timed. A tenth of the samples are
    near copies of references, at distances that squared norms cannot resolve.

    Args:
        memory: bytes for blocks of distances.
        advance: called after each turn.

    Yields:
        Dicts with seconds, the median; ratio, to the product's; peak_memory_mb, on top of both
        sets; wrong, how many of 16 samples have other neighbours than differences in float64 give.
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
                with Peak(device) as peak:
                    run()
                    synchronize(device)
                peaks[name] = peak.megabytes
            else:
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
    """How many of the first samples, some of them copies, have other neighbours in float64."""
    some = x[:CHECKED]
    indices = nearest(some, y, 2, memory).indices
    wanted = [
        (y.double() - one.double()).square().sum(1).topk(2, largest=False).indices for one in some
    ]
    return int((indices != torch.stack(wanted).cpu()).any(1).sum())


app = script(command)

if __name__ == "__main__":
    app()
