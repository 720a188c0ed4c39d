"""`dlmctl memo-eval copies`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.labels import Labels, label_fields, labelled
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, Record, read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.parsing import whole_numbers
from dlmctl.settings.streams import Files, Json, OnErrorOption, Quiet, kept_in

if TYPE_CHECKING:
    from dlmctl.memorization.text.copies import Document, Unit

UnitName = Literal["token", "word", "character"]


def command(
    train: Annotated[
        Path, Knob("The corpus: what the model was trained on.", "--train", metavar="FILE")
    ],
    files: Files = None,
    heldout: Annotated[
        Path | None,
        Knob(
            "As many texts of the same kind that it was not trained on, against which every figure "
            "is taken too. A larger set is cut; a smaller one is refused.",
            "--heldout",
            metavar="FILE",
            shown_default="none",
        ),
    ] = None,
    unit: Annotated[
        UnitName | None,
        Knob(
            "What is counted: tokens of the model; words and punctuation marks, without what is "
            "between them; or characters.",
            "--unit",
            shown_default="token with a model, else word",
        ),
    ] = None,
    model: Annotated[
        str | None,
        Knob(
            "The model whose tokens are counted: hub name, directory or checkpoint. Only its "
            "tokenizer is read.",
            "-m",
            "--model",
            metavar="MODEL",
            env=True,
            shown_default="none",
        ),
    ] = None,
    least: Annotated[
        int, Knob("A text that shares this many units in a row is copied.", "--least", minimum=1)
    ] = 50,
    ngrams: Annotated[
        str, Knob("Lengths n of the n-grams of novelty.", "--ngrams", metavar="NUMBERS")
    ] = "1,2,4,8,16,32",
    rows: Annotated[
        Path | None,
        Knob(
            "Write a record for each text: its longest match, the matching words, and where they "
            "come from.",
            "--rows",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    novelty: Annotated[
        Path | None,
        Knob(
            "Write a record for each n and set, to plot: the share of n-grams that are novel.",
            "--novelty",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    labels: Labels = None,
    json: Json = False,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
) -> None:
    """Measure how much of generated texts occurs verbatim in a corpus.

    Reads records with a completion or a text that a model wrote freely, and searches the corpus for
    every stretch of them with a suffix array: exactly, at any length, within one document. Prompts
    are left out on both sides. Writes one record: longest is the mean over texts of the longest
    match in units, with its 95th percentile and maximum; copied is the share of texts that share
    --least units in a row; novel_N is the share of their n-grams, counted as often as they occur,
    that are not in the corpus. Every figure also comes with the prefix heldout_, taken against
    texts that the model has not seen: what is found there too is not memorization. A longer text
    has more chances of a long match: compare models by texts of similar length.

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
    cut = _unit(unit, model)
    numbers: dict[Hashable, int] = {}

    def documents(paths: list[str], on_error: OnError) -> tuple[list[Document], list[Record]]:
        total = input_lines(paths)
        records = counted(read_records(paths, on_error), "texts", quiet, total)
        return read_documents(records, cut, numbers, on_error)

    of_corpus = kept_in(None, on_error)
    corpus = documents([str(train)], of_corpus)[0]
    texts, faulty = documents(files or [], kept_in(rows, on_error))
    for name, part in (("--train", corpus), ("the input", texts)):
        if not part:
            raise UsageError(f"{name} has no texts; there is nothing to compare")
    sets = {"train": corpus}
    if heldout:
        sets["heldout"], notes = held_out(corpus, documents([str(heldout)], of_corpus)[0])
        for note in notes:
            print(f"dlmctl: {note}", file=sys.stderr)
    prefixes = {name: "" if name == "train" else f"{name}_" for name in sets}
    comparisons = {name: compare(texts, part) for name, part in sets.items()}
    values = {name: figures(each, least, orders) for name, each in comparisons.items()}
    row: dict[str, Any] = {"unit": cut.name}
    if cut.name == "token":
        row["model"] = model
    row |= {"least": least, **_sizes("texts", texts)}
    for name, part in sets.items():
        row |= _sizes(name, part)
        row |= {f"{prefixes[name]}{figure}": value for figure, value in values[name].items()}
    row = labelled(fields, row)
    if novelty:
        curve = [
            labelled(fields, {"set": name, "n": n, "novel": values[name][f"novel_{n}"]})
            for name in sets
            for n in orders
        ]
        write_records(curve, str(novelty))
    if rows:
        by_prefix = {prefixes[name]: each for name, each in comparisons.items()}
        write_records(chain(text_rows(texts, by_prefix, cut), faulty), str(rows))
    if json or not sys.stdout.isatty():
        write_records([row])
    else:
        lines = [
            {"figure": figure, **{name: values[name][figure] for name in sets}}
            for figure in values["train"]
        ]
        print_table(lines, {name: name for name in ("figure", *sets)})


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
