"""`dlmctl bench neighbours`: options and wiring."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.options import Device, Json, Memory, Quiet, Seed
from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.settings.parsing import byte_count


def command(
    samples: Annotated[int, typer.Option("-n", "--samples", min=1, help="Vectors.")] = 4000,
    references: Annotated[int, typer.Option(min=2, help="Vectors among which they look.")] = 4000,
    width: Annotated[int, typer.Option(min=1, help="Numbers of a vector; 3 x 32 x 32.")] = 3072,
    repeats: Annotated[int, typer.Option(min=1, help="Timed turns, after one that is not.")] = 3,
    memory: Memory = "512M",
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Exact nearest neighbours, as of 'dlmctl memo-eval', beside one matrix product of that size.

    Writes for the product in float32 and for the two nearest neighbours: seconds, the median of
    turns by turns; ratio to the product; peak memory in megabytes, on top of both sets; and of 16
    samples, near copies among them, how many have other neighbours than by differences in float64.

    Examples:

    dlmctl bench neighbours

    dlmctl bench neighbours -n 50000 --references 50000 --memory 4G
    """
    from dlmctl.bench.neighbours import compare_neighbours
    from dlmctl.models.loading import resolve_device

    size, where = byte_count("--memory", memory), resolve_device(device)
    with counting("turns", quiet, 2 * (repeats + 1)) as gauge:
        rows = compare_neighbours(
            samples, references, width, repeats, size, seed, where, gauge.advance
        )
        write_rows(rows, ["path", "seconds", "ratio", "peak_memory_mb", "wrong"], json)
