"""`dlmctl view`: options and wiring."""

from __future__ import annotations

import sys
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated

from dlmctl.records.errors import MissingInputError
from dlmctl.records.jsonl import read_records
from dlmctl.settings import Knob
from dlmctl.settings.streams import Files, OnErrorOption


def command(
    files: Files = None,
    by: Annotated[
        str | None,
        Knob(
            "A list with a number for each token of the completion: weights, roles, "
            "rollout.order, rollout.log_probs, or any other.",
            metavar="FIELD",
            shown_default="weights, else rollout.order",
        ),
    ] = None,
    limit: Annotated[
        int | None, Knob("How many completions.", "-n", "--limit", minimum=1, shown_default="all")
    ] = None,
    model: Annotated[
        str | None,
        Knob(
            "Model whose tokenizer spells the tokens: hub name, directory or checkpoint; its "
            "weights are not read.",
            "-m",
            "--model",
            metavar="MODEL",
            shown_default="the record's rollout.model",
        ),
    ] = None,
    html: Annotated[
        Path | None, Knob("Write a page to browse instead, one file of HTML.", metavar="FILE")
    ] = None,
    after_end: Annotated[
        bool, Knob("Show the tokens behind the first end-of-sequence too.", "--after-end")
    ] = False,
    on_error: OnErrorOption = "fail",
) -> None:
    """Show completions token by token, shaded by numbers.

    Reads records with `tokens.completion` and a list of as many numbers. Weights are shaded around
    1, numbers of both signs around 0, and others from the one nearest to 0: orange above, blue
    below. Without colour (a pipe, NO_COLOR), tokens at least half-way out are in brackets,
    {+above+} and [-below-]; the largest and smallest numbers are listed with the positions of their
    tokens. On a terminal each completion has its own scale; a page has one for all. For a record
    that --on-error keep passed on, it shows the error.

    In place of files you can give the directory of a run: it shows the completions that 'dlmctl
    update --keep-samples' kept, and a page also has the curves of the run.

    The page needs no other file: it embeds the images of the records (data: URIs, and relative
    paths to PNG, JPEG, GIF or WebP files), and loads nothing from elsewhere.

    Examples:

    dlmctl rollout -n 2 | dlmctl verify | dlmctl view

    dlmctl view --by rollout.order -n 3 samples.jsonl

    dlmctl view --by roles --html roles.html weighted.jsonl

    dlmctl view --html run.html runs/a
    """
    from rich.console import Console

    from dlmctl.models.token_text import texts_of_model
    from dlmctl.report.completions import Spell, completions

    @cache
    def spell(name: str) -> Spell:
        try:
            return texts_of_model(name).row
        except MissingInputError as error:
            if model is not None:
                raise
            advice = "give --model, one with the same tokenizer"
            raise MissingInputError(f"{error} (rollout.model of a record): {advice}") from None

    run = Path(files[0]) if files and len(files) == 1 and Path(files[0]).is_dir() else None
    if run is not None:
        samples = run / "samples.jsonl"
        if html is None and not samples.exists():
            raise MissingInputError(
                f"{run} has no samples.jsonl: 'dlmctl update --keep-samples N:K' keeps completions"
            )
        files, on_error = [str(samples)], "keep"  # a page of a run does not fail for one of them
        if model is None and (run / "latest" / "dlmctl.json").exists():
            model = str(run)
    there = run is None or (run / "samples.jsonl").exists()
    records = read_records(files or [], on_error) if there else iter(())
    items = islice(completions(records, spell, by, model, after_end, on_error), limit)
    if html is not None:
        from dlmctl.report.token_page import write_page
        from dlmctl.report.watched_run import WatchedRun

        write_page(items, html, WatchedRun(run, [], None) if run is not None else None)
        return
    from dlmctl.report.token_lines import completion_lines

    for text in completion_lines(items, Console(highlight=False)):
        sys.stdout.write(text)
        sys.stdout.flush()
