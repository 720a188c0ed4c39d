"""`dlmctl memo-eval copies`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.labels import Labels, label_fields, labelled
from dlmctl.commands.options import Files, Json, OnErrorOption, Quiet, kept_in
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, Record, read_records, write_records
from dlmctl.settings.parsing import whole_numbers

if TYPE_CHECKING:
    from dlmctl.memorization.text.copies import Document, Unit

UnitName = Literal["token", "word", "character"]


def command(
    train: Annotated[
        Path,
        typer.Option("--train", metavar="FILE", help="The corpus: what the model was trained on."),
    ],
    files: Files = None,
    heldout: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="none",
            help="As many texts of the same kind that it was not trained on: every figure is taken "
            "against them, too. More are cut, fewer are refused.",
        ),
    ] = None,
    unit: Annotated[
        UnitName | None,
        typer.Option(
            "--unit",
            show_default="token with a model, else word",
            help="What is counted: tokens of the model; words and marks, whatever is between them; "
            "characters.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            envvar="DLMCTL_MODEL",
            show_default="none",
            help="Whose tokens are counted: hub name, directory or checkpoint. Only the tokenizer "
            "is read.",
        ),
    ] = None,
    least: Annotated[
        int, typer.Option(min=1, help="A text with so many units in a row is copied.")
    ] = 50,
    ngrams: Annotated[
        str, typer.Option(metavar="NUMBERS", help="Lengths n of the n-grams of novelty.")
    ] = "1,2,4,8,16,32",
    rows: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="off",
            help="A record for each text: its longest match, the words of it, and whose they are.",
        ),
    ] = None,
    novelty: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default="off",
            help="A record for each n and set: the share of n-grams that are novel, to draw.",
        ),
    ] = None,
    labels: Labels = None,
    json: Json = False,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """How much of generated texts stands word for word in a corpus.

    Reads records with a completion, or a text, that a model wrote freely, and looks for every
    stretch of them in the corpus by a suffix array: exactly, however long, within one document.
    Prompts are left out on both sides. Writes one record: longest is the mean over texts of the
    longest match in units, with its 95th percentile and maximum; copied the share of texts with
    --least units in a row; novel_N the share of their n-grams, counted as often as they come, that
    the corpus does not have. Beside each stands heldout_ the same against texts that the model has
    not seen: what is found there, too, is no memory. A longer text has more chances of a long
    match: compare models by texts of like length.

    Examples:

    dlmctl rollout -n 4 prompts.jsonl | dlmctl memo-eval copies --train train.jsonl --heldout
    unseen.jsonl --rows copies.jsonl

    dlmctl memo-eval copies --train train.jsonl --heldout unseen.jsonl --novelty novel.jsonl
    samples.jsonl; dlmctl plot novel.jsonl -x n -y novel --by set --log-x -o novel.png
    """
    from dlmctl.memorization.text.copies import (
        compare,
        figures,
        held_out,
        read_documents,
        text_rows,
    )

    fields = label_fields(labels)
    orders = whole_numbers("--ngrams", ngrams)
    chosen = _unit(unit, model)
    numbers: dict[Hashable, int] = {}

    def documents(paths: list[str], on_error: OnError) -> tuple[list[Document], list[Record]]:
        total = input_lines(paths)
        records = counted(read_records(paths, on_error), "texts", quiet, total)
        return read_documents(records, chosen, numbers, on_error)

    of_corpus = kept_in(None, on_error)
    corpus = documents([str(train)], of_corpus)[0]
    texts, faulty = documents(files or [], kept_in(rows, on_error))
    for name, found in (("--train", corpus), ("the input", texts)):
        if not found:
            raise UsageError(f"{name} holds no texts; there is nothing to compare")
    sets = {"train": corpus}
    if heldout:
        sets["heldout"], notes = held_out(corpus, documents([str(heldout)], of_corpus)[0])
        for note in notes:
            print(f"dlmctl: {note}", file=sys.stderr)
    against = {name: compare(texts, own) for name, own in sets.items()}
    made = {name: figures(pair, least, orders) for name, pair in against.items()}
    row: dict[str, Any] = {"unit": chosen.name}
    if chosen.name == "token":
        row["model"] = model
    row |= {"least": least, **_sizes("texts", texts)}
    for name, own in sets.items():
        row |= _sizes(name, own)
        row |= {f"{_prefix(name)}{figure}": value for figure, value in made[name].items()}
    row = labelled(fields, row)
    if novelty:
        write_records(_curve(fields, made, orders), str(novelty))
    if rows:
        pairs = {_prefix(name): pair for name, pair in against.items()}
        write_records(chain(text_rows(texts, pairs, chosen), faulty), str(rows))
    if json or not sys.stdout.isatty():
        write_records([row])
    else:
        lines = [
            {"figure": name, **{of: values[name] for of, values in made.items()}}
            for name in made["train"]
        ]
        print_table(lines, {name: name for name in ("figure", *made)})


def _prefix(name: str) -> str:
    """Of the fields of a set."""
    return "" if name == "train" else f"{name}_"


def _sizes(name: str, documents: Sequence[Document]) -> dict[str, int]:
    units = sum(len(document.symbols) for document in documents)
    return {name: len(documents), f"{name}_units": units}


def _unit(name: UnitName | None, model: str | None) -> Unit:
    from dlmctl.memorization.text.copies import CHARACTER, WORD, Unit

    if name == "token" and model is None:
        raise UsageError("--unit token needs the model whose tokens they are: give -m")
    if name == "character":
        return CHARACTER
    if name == "word" or model is None:
        return WORD
    from dlmctl.models.prompting import text_ids
    from dlmctl.models.token_text import tokenizer_of_model

    tokenizer, whose = tokenizer_of_model(model), model

    def cut(text: str) -> list[int]:
        return text_ids(tokenizer, text, whose)

    def piece(text: str, start: int, end: int) -> str:
        return str(tokenizer.decode(cut(text)[start:end]))

    return Unit("token", cut, piece)


def _curve(
    fields: dict[str, Any], made: Mapping[str, Mapping[str, Any]], orders: Sequence[int]
) -> list[dict[str, Any]]:
    """A record for each set and n."""
    curve = [
        {"set": name, "n": n, "novel": found[f"novel_{n}"]}
        for name, found in made.items()
        for n in orders
    ]
    return [labelled(fields, row) for row in curve]
