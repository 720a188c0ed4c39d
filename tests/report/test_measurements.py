"""Means of measures over records."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from conftest import invoke

from dlmctl.records.jsonl import Record, dump, parse_record
from dlmctl.report.measurements import averages, is_measurement
from dlmctl.report.plots import averaged

ROWS = [
    Record(sae=f"{seed}/a", layer=layer, k=k, fve=0.1 * seed + 0.01 * k + layer, t=[0, 1])
    for seed in (1, 2, 4)
    for layer, k in ((1, 8), (1, 32), (3, 8))
]


def test_rows_have_means_and_standard_errors_over_seeds() -> None:
    rows = averages(ROWS, ["layer", "k"])
    assert [(row["layer"], row["k"], row["records"]) for row in rows] == [
        (1, 8, 3), (1, 32, 3), (3, 8, 3), ("all", "all", 9),
    ]  # fmt: skip
    values = [0.1 * seed + 1.08 for seed in (1, 2, 4)]
    assert rows[0]["fve"] == pytest.approx(statistics.mean(values))
    assert rows[0]["fve_se"] == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert "t" not in rows[0]
    assert "fve_se" not in averages(ROWS[:1], ["layer"])[0]


def test_the_error_of_a_record_is_no_measure_to_average() -> None:
    rows = [Record(delta=d, delta_se=0.5, firing_se=f) for d, f in ((1.0, 1.0), (3.0, 2.0))]
    [row] = averages(rows, [])
    assert row["delta"] == 2.0
    assert row["delta_se"] == pytest.approx(1.0)  # between the records, not the mean of theirs
    assert row["firing_se"] == 1.5  # stands behind no measure
    assert averages(rows[:1], [])[0]["delta_se"] == 0.5
    assert averages([*rows[1:], *rows[:1]], [])[0] == row


def test_completions_are_no_measurements() -> None:
    assert is_measurement(ROWS[0])
    assert not is_measurement(Record(id=1, completion="x", reward=0.5))
    assert not is_measurement(Record(text="x"))


def test_stats_takes_measures(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_bytes(b"".join(map(dump, ROWS)))
    done = invoke("stats", path, "--by", "k")
    rows = [parse_record(line.encode(), "") for line in done.stdout.splitlines()]
    assert [row["k"] for row in rows] == [8, 32, "all"]
    assert invoke("stats", path, "--fail-under", "fve=9").exit_code == 1
    assert invoke("plot", path, "-x", "k", "-y", "fve", "-o", tmp_path / "p.png").exit_code == 0


def test_points_at_one_place_become_their_mean() -> None:
    assert averaged([(2, 5.0), (1, 1.0), (1, 3.0)]) == [(1, 2.0, 1.0), (2, 5.0, 0.0)]
