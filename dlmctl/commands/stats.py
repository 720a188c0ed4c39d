"""`dlmctl stats`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.parsing import named_number
from dlmctl.settings.streams import Files, OnErrorOption, Output, Quiet


def command(
    files: Files = None,
    by: Annotated[
        str | None,
        Knob(
            "A row for each value of this field: task, model, round, …; for records of measures "
            "it may be a list of fields.",
            metavar="FIELD",
            shown_default="task; for measures layer, k, positions",
        ),
    ] = None,
    ks: Annotated[
        list[int] | None,
        Knob("k of pass@k; repeatable.", "-k", "--pass-at", minimum=1, shown_default="1"),
    ] = None,
    confidence: Annotated[
        float, Knob("Level of the accuracy's interval.", minimum=0.5, maximum=0.9999)
    ] = 0.95,
    image_free: Annotated[
        str | None,
        Knob(
            "Add `image_free`: the accuracy of always giving the answer that is most frequent for "
            "the prompt in these records, without a look at the image.",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    within: Annotated[
        list[str] | None,
        Knob(
            "Add `within.NAME`: among the samples of a prompt, the correlation of being right with "
            "what this verifier says, as in --within grounding; repeatable.",
            metavar="NAME",
            shown_default="none",
        ),
    ] = None,
    fail_under: Annotated[
        list[str] | None,
        Knob(
            "Exit 1 if a measure over all records (accuracy, reward, pass@1, cells, …) is below "
            "this; repeatable.",
            metavar="MEASURE=VALUE",
            shown_default="never",
        ),
    ] = None,
    on_error: OnErrorOption = "fail",
    quiet: Quiet = False,
    output: Output = "-",
) -> None:
    """Accuracy, pass@k, reward and length per task.

    Reads verified records and writes a table on a terminal, JSON lines in a pipe or file. The
    accuracy's interval is Wilson's, widened because samples of one prompt are alike. Accuracy goes
    by the rules, as a puzzle may have several solutions; `cells` is the share of empty Sudoku cells
    that equal the stored solution, `stored` the share of whole grids that do. If several verifiers
    judged, each has a column: `rewards.grounding` is the one of descriptions.

    Records of measures, as 'dlmctl sae-eval' writes them, are averaged, with standard errors.

    Examples:

    dlmctl rollout -n 8 | dlmctl verify | dlmctl stats -k 1 -k 8

    dlmctl stats --by layer,k seed-*/eval.jsonl

    dlmctl stats --within grounding verified.jsonl

    dlmctl stats --by kind --image-free train.jsonl verified.jsonl

    dlmctl stats --fail-under accuracy=0.8 verified.jsonl || mail -s "worse" me@example.org
    """
    from dlmctl.report.image_free import frequent_answers, with_image_free
    from dlmctl.report.measurements import averages, is_measurement, present
    from dlmctl.report.statistics import tally

    limits = [named_number("--fail-under", text, "MEASURE=NUMBER") for text in fail_under or []]
    total = input_lines(files)
    records = counted(read_records(files or [], on_error), "records", quiet, total)
    first = next(records, None)
    records = chain([] if first is None else [first], records)
    if first is not None and is_measurement(first):
        rows = averages(records, by.split(",") if by else present(first))
    else:
        if image_free:
            records = with_image_free(records, frequent_answers(read_records([image_free])))
        rows = tally(records, by or "task", ks or [1], confidence, within or [])
    if output == "-" and sys.stdout.isatty():
        _table(rows, by or "task")
    else:
        write_records(rows, output)
    failed = False
    for measure, least in limits:
        value = rows[-1].get(measure)
        if not isinstance(value, (int, float)):
            others = ", ".join(k for k, v in rows[-1].items() if isinstance(v, (int, float)))
            raise UsageError(f"--fail-under {measure}: no such measure; there are {others}")
        if value < least:
            print(f"dlmctl: {measure} is {value:.4g}, under {least:g}", file=sys.stderr)
            failed = True
    if failed:
        raise typer.Exit(1)


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
