"""What `stats` fails for: measures below a limit, and measures worse than a baseline's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dlmctl.records.errors import UsageError


class Gate(NamedTuple):
    """A condition, and how it turned out."""

    name: str
    passed: bool
    said: str
    """The measure and what it is compared with."""


def limits(row: Mapping[str, Any], least: Sequence[tuple[str, float]]) -> list[Gate]:
    """Whether measures of a row reach these values; raises UsageError if it has no such measure."""
    gates = []
    for measure, limit in least:
        value = row.get(measure)
        if not isinstance(value, (int, float)):
            others = [name for name, value in row.items() if isinstance(value, (int, float))]
            raise UsageError(_unknown("--fail-under", measure, others))
        passed = not value < limit
        said = f"{measure} is {value:.4g}, {'not ' if passed else ''}under {limit:g}"
        gates.append(Gate(f"{measure} >= {limit:g}", passed, said))
    return gates


def regressions(
    rows: Sequence[Mapping[str, Any]], measures: Sequence[str], confidence: float
) -> list[Gate]:
    """Whether measures are not significantly worse than those of a baseline, over all pairs.

    Args:
        rows: of `comparison_rows`.

    Raises:
        UsageError: a measure was not compared.
    """
    compared = {row["measure"]: row for row in rows if row["task"] == rows[-1]["task"]}
    gates = []
    for measure in measures:
        if measure not in compared:
            raise UsageError(_unknown("--fail-worse", measure, list(compared)))
        row = compared[measure]
        low, high = row["interval"]
        passed = row["change"] != "worse"
        said = (
            f"{measure} is {'not ' if passed else ''}significantly worse than in the baseline: "
            f"{row['value']:.4g} and {row['baseline']:.4g}, difference {row['difference']:+.4g} "
            f"({100 * confidence:g} % interval {low:+.4g} to {high:+.4g}, p = {row['p']:.2g}, "
            f"{row['prompts']} prompts)"
        )
        gates.append(Gate(f"{measure} not worse than the baseline", passed, said))
    return gates


def _unknown(option: str, measure: str, others: Sequence[str]) -> str:
    return f"{option} {measure}: no such measure; there are {', '.join(others)}"
