"""`dlmctl bench elbo`: options and wiring."""

from __future__ import annotations

from typing import Annotated

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Seed,
)
from dlmctl.commands.progress import counting
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import read_records
from dlmctl.settings.parsing import whole_numbers


def command(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FILE", help="Completions in JSONL files; none, or -, is standard input."
        ),
    ] = None,
    model: Model = "builtin:puzzles",
    samples: Annotated[
        str,
        typer.Option("-k", "--masks-per-sample", help="Masks for each completion, one or more."),
    ] = "2,4,8",
    repeats: Annotated[
        int, typer.Option(min=2, help="Independent estimates that the variance is taken over.")
    ] = 100,
    quiet: Quiet = False,
    json: Json = False,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Variance and bias of the estimators of score-elbo, at equal forward passes.

    Writes a row for each mask law: variance in nats², its ratio to that of independent t, the
    variance that the mean of a prompt's samples keeps (group_variance: below `variance` where
    levels are spread over the samples), and the bias. A table on a terminal, JSON in a pipe.

    Examples:

    dlmctl rollout | dlmctl bench elbo

    dlmctl bench elbo -m runs/a -k 2,4 --repeats 400 completions.jsonl
    """
    from dlmctl.bench.elbo import elbo_variance, estimates
    from dlmctl.models.loading import load_policy

    passes = whole_numbers("-k", samples)
    records = list(read_records(files or [], "fail"))
    if not records:
        raise UsageError("no records came in; nothing to measure on")
    policy = load_policy(model, device, dtype)
    names = ["masks", "passes", "variance", "group_variance", "ratio", "bias", "bias_stderr"]
    with counting("estimates", quiet, estimates(passes, repeats)) as gauge:
        rows = elbo_variance(policy, records, passes, repeats, seed, batch_size, gauge.advance)
        write_rows(rows, names, json)
