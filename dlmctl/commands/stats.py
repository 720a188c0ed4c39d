"""`dlmctl stats`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.options import Files, OnErrorOption, Output, Quiet
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import read_records, write_records


def command(
    files: Files = None,
    by: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            show_default="task; of measures layer, k, positions",
            help="A row for each value: task, model, round, …; of measures a list of fields too.",
        ),
    ] = None,
    ks: Annotated[
        list[int] | None,
        typer.Option("-k", "--pass-at", min=1, show_default="1", help="k of pass@k; repeatable."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0.5, max=0.9999, help="Level of the accuracy's interval.")
    ] = 0.95,
    image_free: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default="off",
            help="Add `image_free`: the accuracy of the answer that is most frequent for a prompt "
            "in these records, given without a look at the image.",
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MEASURE=VALUE",
            show_default="never",
            help="Exit 1 when a measure over all records (accuracy, reward, pass@1, cells, …) is "
            "below this; repeatable.",
        ),
    ] = None,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Accuracy, pass@k, reward and length per task.

    Reads verified records and writes a table on a terminal, JSON lines in a pipe or file. The
    accuracy's interval is Wilson's, widened for the samples of one prompt being alike; `cells` is
    the share of empty Sudoku cells that equal the stored solution, `stored` that of whole grids;
    accuracy goes by the rules, as a puzzle may have other solutions. Where several verifiers
    judged, there is a column for each: `rewards.grounding` is that of descriptions.

    Records of measures, as 'dlmctl sae-eval' writes them, are averaged, with standard errors.

    Examples:

    dlmctl rollout -n 8 | dlmctl verify | dlmctl stats -k 1 -k 8

    dlmctl stats --by layer,k seed-*/eval.jsonl

    dlmctl stats --by kind --image-free train.jsonl verified.jsonl

    dlmctl stats --fail-under accuracy=0.8 verified.jsonl || mail -s "worse" me@example.org
    """
    from dlmctl.report.image_free import frequent_answers, with_image_free
    from dlmctl.report.measurements import averages, is_measurement, present
    from dlmctl.report.statistics import tally

    limits = [_limit(text) for text in fail_under or []]
    total = input_lines(files)
    records = counted(read_records(files or [], on_error), "records", quiet, total)
    first = next(records, None)
    records = chain([] if first is None else [first], records)
    if first is not None and is_measurement(first):
        rows = averages(records, by.split(",") if by else present(first))
    else:
        if image_free:
            records = with_image_free(records, frequent_answers(read_records([image_free])))
        rows = tally(records, by or "task", ks or [1], confidence)
    if output == "-" and sys.stdout.isatty():
        _table(rows, by or "task")
    else:
        write_records(rows, output)
    failed = False
    for measure, least in limits:
        value = rows[-1].get(measure)
        if not isinstance(value, (int, float)):
            there = ", ".join(k for k, v in rows[-1].items() if isinstance(v, (int, float)))
            raise UsageError(f"--fail-under {measure}: no such measure; there are {there}")
        if value < least:
            print(f"dlmctl: {measure} is {value:.4g}, under {least:g}", file=sys.stderr)
            failed = True
    if failed:
        raise typer.Exit(1)


def _limit(text: str) -> tuple[str, float]:
    measure, _, value = text.partition("=")
    try:
        return measure, float(value)
    except ValueError:
        raise UsageError(f"--fail-under {text} is not MEASURE=NUMBER") from None


def _table(rows: Sequence[dict[str, Any]], by: str) -> None:
    errors = {f"{name}_se" for row in rows for name in row}
    names = dict.fromkeys(
        name for row in rows for name in row if name != "interval" and name not in errors
    )
    print_table(rows, {name: by if name == "task" else name for name in names}, _cell)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name == "accuracy":
        low, high = row["interval"]
        return f"{value:.1%} ({low:.1%}–{high:.1%})"
    if name.startswith("pass@") or name in ("cells", "stored", "finished", "image_free"):
        return f"{value:.1%}"
    if f"{name}_se" in row:
        return f"{value:.4g} ± {row[f'{name}_se']:.2g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
