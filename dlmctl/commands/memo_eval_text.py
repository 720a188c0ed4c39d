"""`dlmctl memo-eval text`: options and wiring."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from dlmctl.commands.options import (
    BatchSize,
    Device,
    Dtype,
    Files,
    Json,
    Model,
    OnErrorOption,
    Quiet,
    Seed,
    kept_in,
)
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import write_rows
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import read_records, write_records
from dlmctl.settings.models import Prompting, Reading
from dlmctl.settings.parsing import whole_numbers

COLUMNS = (
    "mode",
    "steps",
    "texts",
    "extractable",
    "exact",
    "near",
    "near_bleu",
    "log_prob_per_token",
)


def command(
    files: Files = None,
    model: Model = "builtin:puzzles",
    reading: Reading = Reading(),
    prompting: Prompting = Prompting(),
    heldout: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="off",
            help="Texts that the model has not seen: the same figures of them stand beside.",
        ),
    ] = None,
    modes: Annotated[
        str,
        typer.Option(
            "--mode",
            metavar="MODES",
            help="What is given: prefix, suffix, edge (both ends), random; several with commas.",
        ),
    ] = "prefix",
    given: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, help="Share of a text's tokens that is given; of each at least one."
        ),
    ] = 0.5,
    steps: Annotated[
        str,
        typer.Option(
            metavar="NUMBERS",
            help="Sampling steps for what is asked for; compare models at the same ones.",
        ),
    ] = "1,2,4,8,16",
    orders: Annotated[
        int,
        typer.Option(
            min=0,
            help="Random orders that the probability of a text is the mean over; 0 takes the order "
            "of confidence.",
        ),
    ] = 8,
    n: Annotated[int, typer.Option("-n", min=1, help="Samples that may be drawn.")] = 100,
    p: Annotated[
        float,
        typer.Option("-p", help="Chance of the text among them from which it is extractable."),
    ] = 0.5,
    rows: Annotated[
        Path | None,
        typer.Option(
            "--rows", metavar="FILE", show_default="off", help="A record for each text, too."
        ),
    ] = None,
    json: Json = False,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    device: Device = "auto",
    dtype: Dtype = "auto",
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """How many texts a language model gives back when it is shown a part of them.

    Reads records with a completion, or a text, such as those that a model was trained on. Writes a
    row for each mode and number of steps: the share that is extractable, that comes up at least
    once in -n samples with a chance of -p; the share that the most likely tokens give back exactly
    and nearly, by edits (near: a tenth of the tokens at most) and by sentence BLEU-4 (near_bleu:
    0.75 or more); common_run, the tokens that they give back in a row; and the log-probability per
    token. A model of few steps extracts less for that alone: compare at equal steps. With --mode
    random what is asked for is taken as one row of tokens, whatever is given between them.

    Examples:

    dlmctl memo-eval text -m runs/base --mode prefix,edge --heldout unseen.jsonl canaries.jsonl
    """
    from dlmctl.memorization.text.extraction import Mode
    from dlmctl.memorization.text.text_memory import Extraction, text_memory
    from dlmctl.models.loading import load_policy

    chosen: list[Any] = modes.split(",")
    if unknown := [mode for mode in chosen if mode not in get_args(Mode)]:
        raise UsageError(f"--mode {unknown[0]} is not one of {', '.join(get_args(Mode))}")
    if not 0 < p < 1:
        raise UsageError(f"-p {p:g} is not between 0 and 1")
    plan = Extraction(chosen, given, whole_numbers("--steps", steps), orders, n, p, seed)
    faulty = kept_in(rows, on_error)
    texts = read_records(files or [], faulty)
    unseen = read_records([str(heldout)], faulty) if heldout else iter(())
    policy = load_policy(reading.name(model), device, dtype, prompting)
    found: list[dict[str, Any]] = []
    note = found.append if rows else None
    summary = text_memory(policy, texts, unseen, plan, batch_size, note, faulty)
    # A row takes as long as its steps.
    reached = list(accumulate([*plan.steps] * len(chosen) if policy.diffusion else [1]))
    places = iter(reached)
    shown = counted(summary, "steps", quiet, reached[-1], at=lambda _: next(places))
    write_rows(shown, COLUMNS, json)
    if rows is not None:
        write_records(found, str(rows))
