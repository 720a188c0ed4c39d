"""`dlmctl view`: options and wiring."""

from __future__ import annotations

import sys
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from dlmctl.commands.options import Files, OnErrorOption
from dlmctl.records.errors import MissingInputError
from dlmctl.records.jsonl import read_records


def command(
    files: Files = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            show_default="weights, else rollout.order",
            help="A list with a number for each token of the completion: weights, roles, "
            "rollout.order, rollout.log_probs, or any other.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("-n", "--limit", min=1, show_default="all", help="How many completions."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            show_default="the record's rollout.model",
            help="Whose tokenizer spells the tokens: hub name, directory or checkpoint; its "
            "weights are not read.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page to browse instead, one file of HTML."),
    ] = None,
    after_end: Annotated[
        bool, typer.Option("--after-end", help="Tokens behind the first end-of-sequence too.")
    ] = False,
    on_error: OnErrorOption = "fail",
) -> None:
    """Show completions token by token, shaded by numbers.

    Reads records with `tokens.completion` and a list of numbers as long. Weights are shaded around
    1, numbers of both signs around 0, others from the one nearest to 0 on: orange above, blue
    below. Without colour (a pipe, NO_COLOR) tokens half-way out or farther stand in brackets,
    {+above+} and [-below-]; the largest and smallest numbers are listed with the place of their
    token. On a terminal each completion has its own scale, on a page there is one for all. Of a
    record kept by --on-error keep the complaint is shown.

    The page needs no other file: images of the records (data: URIs, and relative paths to PNG,
    JPEG, GIF or WebP files) are put into it, and nothing is loaded from elsewhere.

    Examples:

    dlmctl rollout -n 2 | dlmctl verify | dlmctl view

    dlmctl view --by rollout.order -n 3 samples.jsonl

    dlmctl view --by roles --html roles.html weighted.jsonl
    """
    from rich.console import Console

    from dlmctl.models.token_text import texts_of_model
    from dlmctl.report.completions import Spell, completions
    from dlmctl.report.token_lines import completion_lines
    from dlmctl.report.token_page import write_page

    @cache
    def spell(name: str) -> Spell:
        try:
            return texts_of_model(name).row
        except MissingInputError as error:
            if model is not None:
                raise
            advice = "give --model, one with the same tokenizer"
            raise MissingInputError(f"{error} (rollout.model of a record): {advice}") from None

    records = read_records(files or [], on_error)
    items = islice(completions(records, spell, by, model, after_end, on_error), limit)
    if html is not None:
        write_page(items, html)
        return
    for text in completion_lines(items, Console(highlight=False)):
        sys.stdout.write(text)
        sys.stdout.flush()
