"""`dlmctl sae-judge`: options and wiring of the stage."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.records.jsonl import Record, each, read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.compute import Compute, Seed
from dlmctl.settings.features import Neuronpedia
from dlmctl.settings.streams import Files, OnErrorOption, Output, Quiet


def command(
    files: Files = None,
    judge: Annotated[
        str | None,
        Knob("Let this model answer both prompts here, and write scores at once.", metavar="MODEL"),
    ] = None,
    gen_length: Annotated[int, Knob("With --judge: tokens of an answer.", minimum=1)] = 64,
    html: Annotated[
        Path | None, Knob("Write the page of 'sae-features --html', with scores.", metavar="FILE")
    ] = None,
    neuronpedia: Neuronpedia = None,
    seed: Seed = 0,
    compute: Compute = Compute(batch_size=16),
    on_error: OnErrorOption = "keep",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Have a judge explain features and score how well it does.

    Reads records of 'dlmctl sae-features' and takes each one a step further. A new record gets the
    prompt that asks for an explanation (`prompt`); once that is answered (`completion`), the prompt
    that asks in which of 14 unmarked windows the feature is active; once that is answered too,
    `judged`: accuracy and balanced accuracy. Any program that adds a `completion` to a record can
    be the judge.

    A judge that always answers None has accuracy 0.714 and balanced accuracy 0.5. Features that
    were never active, and answers that cannot be read, are counted and left out of the means.

    Examples:

    dlmctl sae-judge features.jsonl | dlmctl rollout -m JUDGE -n 1 --temperature 0 > explained.jsonl

    dlmctl sae-judge explained.jsonl | dlmctl rollout -m JUDGE -n 1 | dlmctl sae-judge

    dlmctl sae-judge --judge GSAI-ML/LLaDA-8B-Instruct --html features.html features.jsonl
    """
    from dlmctl.sae.features.autointerp import advance
    from dlmctl.sae.features.neuronpedia import source_of, with_neuronpedia
    from dlmctl.sae.features.page import with_page

    if neuronpedia is not None:
        source_of(neuronpedia)

    def step(records: Iterable[Record]) -> Iterator[Record]:
        return each(records, lambda record: advance(record, seed), on_error)

    total = input_lines(files)
    records = step(read_records(files or [], on_error))
    if judge is not None:
        from dlmctl.sae.judges import judge_model

        ask = judge_model(judge, gen_length, compute, seed, on_error)
        for _ in range(2):
            records = step(ask(records))
    if html is not None:
        records = with_page(records, html)
    if neuronpedia is not None:
        records = with_neuronpedia(records, neuronpedia)
    write_records(_with_summary(counted(records, "features", quiet, total)), output)


def _with_summary(records: Iterable[Record]) -> Iterator[Record]:
    """The records; after the last one, a line on stderr says how the judge did."""
    scores: list[tuple[float, float]] = []
    waiting, failed = 0, 0
    for record in records:
        if "error" in record:
            failed += 1
        elif "judged" in record:
            judged = record["judged"]
            scores.append((judged["accuracy"], judged["balanced_accuracy"]))
        else:
            waiting += 1
        yield record
    parts = [f"{waiting} to be answered"] if waiting else []
    if scores:
        accuracy, balanced = (sum(column) / len(scores) for column in zip(*scores, strict=True))
        parts.append(
            f"{len(scores)} judged, accuracy {accuracy:.3f}, balanced accuracy {balanced:.3f}"
        )
    if failed or not parts:
        parts.append(f"{failed} that could not be judged")
    print(f"dlmctl: features: {'; '.join(parts)}", file=sys.stderr)
