"""`dlmctl stats`: options and wiring."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dlmctl.commands.input_lines import input_lines
from dlmctl.commands.progress import counted
from dlmctl.commands.tables import print_table
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import OnError, read_records, write_records
from dlmctl.settings import Knob
from dlmctl.settings.parsing import named_number
from dlmctl.settings.report import Comparing
from dlmctl.settings.streams import Files, OnErrorOption, Output, Quiet

if TYPE_CHECKING:
    from dlmctl.report.comparison import Comparison


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
        float,
        Knob(
            "Level of the accuracy's interval, and of those of differences.",
            minimum=0.5,
            maximum=0.9999,
        ),
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
    junit: Annotated[
        Path | None,
        Knob(
            "Also write JUnit XML: a suite for each row, with its measures and prompts, and one "
            "for --fail-under and --fail-worse, whose cases alone can fail.",
            metavar="FILE",
            shown_default="off",
        ),
    ] = None,
    comparing: Comparing = Comparing(),
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

    With --compare, the rows are differences from a baseline. Samples of one prompt stay together in
    the bootstrap and in the exchanges that p counts; for accuracy with one sample a prompt, p is
    that of McNemar's exact test. `lost` and `gained` are prompts that were right and are not, and
    the reverse, and `mcnemar` is the p of that test on them; of several samples, more than half
    must be right.

    Records of measures, as 'dlmctl sae-eval' writes them, are averaged, with standard errors.

    Examples:

    dlmctl rollout -n 8 | dlmctl verify | dlmctl stats -k 1 -k 8

    dlmctl stats --by layer,k seed-*/eval.jsonl

    dlmctl stats --within grounding verified.jsonl

    dlmctl stats --by kind --image-free train.jsonl verified.jsonl

    dlmctl stats --fail-under accuracy=0.8 verified.jsonl || mail -s "worse" me@example.org

    dlmctl stats --compare baseline.jsonl --fail-worse accuracy --junit report.xml verified.jsonl
    """
    from dlmctl.report.gates import limits, regressions
    from dlmctl.report.image_free import frequent_answers, with_image_free
    from dlmctl.report.measurements import averages, is_measurement, present
    from dlmctl.report.statistics import tally

    least = [named_number("--fail-under", text, "MEASURE=NUMBER") for text in fail_under or []]
    by_field, ks = by or "task", ks or [1]
    comparison = _baseline(comparing, files, image_free or within, by_field, on_error)
    total = input_lines(files)
    records = counted(read_records(files or [], on_error), "records", quiet, total)
    first = next(records, None)
    records = chain([] if first is None else [first], records)
    if first is not None and is_measurement(first) and not comparison:
        by_field = by or ",".join(present(first))
    elif image_free:
        records = with_image_free(records, frequent_answers(read_records([image_free])))
    if comparison:
        records = comparison.collected(records)
    report = None
    if junit:
        from dlmctl.report.junit import Report

        report = Report(by_field)
        records = report.seen(records)
    if first is not None and is_measurement(first) and not comparison:
        rows = averages(records, by_field.split(","))
    else:
        rows = tally(records, by_field, ks, confidence, within or [])
    compared = comparison.rows(ks, confidence, comparing) if comparison else []
    if output == "-" and sys.stdout.isatty():
        _table(compared or rows, by_field)
    else:
        write_records(compared or rows, output)
    gates = limits(rows[-1] if rows else {}, least)
    gates += regressions(compared, comparing.fail_worse or [], confidence)
    if junit and report:
        report.write(junit, rows, gates, compared, comparison)
    for gate in gates:
        if not gate.passed:
            print(f"dlmctl: {gate.said}", file=sys.stderr)
    if not all(gate.passed for gate in gates):
        raise typer.Exit(1)


def _baseline(
    comparing: Comparing, files: Sequence[str] | None, others: object, by: str, on_error: OnError
) -> Comparison | None:
    """The comparison that the options ask for, with the baseline's records; raises UsageError."""
    if comparing.compare is None:
        if comparing.fail_worse:
            raise UsageError("--fail-worse compares with a baseline: name it with --compare")
        return None
    if others:
        raise UsageError("--image-free and --within are of single files: leave out --compare")
    if comparing.compare == "-" and "-" in (files or ["-"]):
        raise UsageError("standard input cannot be both the records and the baseline")
    from dlmctl.report.comparison import Comparison

    return Comparison(read_records([comparing.compare], on_error), by)


def _table(rows: Sequence[dict[str, Any]], by: str) -> None:
    errors = {f"{name}_se" for row in rows for name in row}
    names = dict.fromkeys(
        name for row in rows for name in row if name not in (*errors, "interval", "unpaired")
    )
    print_table(rows, {name: by if name == "task" else name for name in names}, _cell)


def _cell(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None:
        return "-"
    if name == "difference":
        low, high = row["interval"]
        return f"{value:+.4g} ({low:+.4g} to {high:+.4g})"
    if name in ("p", "mcnemar"):
        return f"{value:.2g}"
    if name == "accuracy":
        low, high = row["interval"]
        return f"{value:.1%} ({low:.1%}–{high:.1%})"
    if name.startswith("pass@") or name in ("cells", "stored", "finished", "image_free"):
        return f"{value:.1%}"
    if f"{name}_se" in row:
        return f"{value:.4g} ± {row[f'{name}_se']:.2g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
