"""The page of a run: its curves as SVG, the completions that were kept, or that none were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import invoke
from html_page import EVIL, Page

import dlmctl
from dlmctl.report.svg_curves import HIGH, WIDE, figures

PUZZLES = Path(dlmctl.__file__).parent / "assets" / "puzzles"


def points(figure: str) -> list[list[tuple[float, float]]]:
    lines = Page(f"<div>{figure}</div>").attributes("polyline")
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in str(line["points"]).split())]
        for line in lines
    ]


def test_a_curve_goes_through_its_points_from_the_lowest_to_the_highest() -> None:
    [figure] = figures({"loss": {"": [(0, 4.0), (150, 1.0), (300, 2.0)]}})
    [line] = points(figure)
    found = dict(line)
    assert (found[0.0], found[150.0]) == (0.0, HIGH)
    assert found[float(WIDE)] == pytest.approx(HIGH * 2 / 3, abs=0.1)
    assert found[75.0] == pytest.approx(HIGH / 2, abs=0.1)


def test_a_single_point_and_a_constant_are_lines_too() -> None:
    alone, constant = figures({"a": {"": [(7, 3.0)]}, "b": {"": [(1, 2.0), (5, 2.0)]}})
    assert points(alone) == [[(0.0, HIGH / 2), (WIDE, HIGH / 2)]]
    assert {y for _, y in points(constant)[0]} == {HIGH / 2}


def test_lines_of_a_run_share_their_axes_and_names_are_escaped() -> None:
    [figure] = figures({EVIL[0]: {EVIL[1]: [(0, 0.0), (1, 0.0)], "b": [(0, 1.0), (1, 1.0)]}})
    assert "<script" not in figure
    assert [{y for _, y in line} for line in points(figure)] == [{float(HIGH)}, {0.0}]


def run_of(place: Path) -> Path:
    """A run with the model of the puzzles as its checkpoint."""
    run = place / "a"
    shutil.copytree(PUZZLES, run / "step-000002", ignore=shutil.ignore_patterns("*.safetensors"))
    (run / "latest").symlink_to("step-000002")
    progress = {"algo": "rspo", "reference": "builtin:puzzles", "round": 2, "completions": 64}
    (run / "latest/dlmctl.json").write_text(json.dumps(progress))
    steps = [{"algo": "rspo", "step": step, "reward": step / 4} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return run


def test_a_page_has_curves_and_the_completions_by_round(tmp_path: Path) -> None:
    run, ids = run_of(tmp_path), [5, 6, 7]
    rows = [
        {
            "step": number + 1,
            "round": number,
            "id": f"p{number}",
            "sample": 0,
            "prompt": EVIL[0],
            "reward": 1.0,
            "tokens": {"completion": ids},
            # Removed since: the newest checkpoint spells the tokens.
            "rollout": {"model": str(run / "step-000001"), "order": [0, 1, 2], "length": 3},
        }
        for number in (0, 1)
    ]
    (run / "samples.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    done = invoke("view", "--html", tmp_path / "page.html", run)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert len(page.attributes("polyline")) == 1
    assert {"round 0: p0 sample 0", "round 1: p1 sample 0"} <= {found for _, found in page.texts}
    assert {"Run a", "builtin:puzzles", "64"} <= {found for _, found in page.texts}
    assert "<script>alert" not in text
    assert not [tag for tag, about in page.tags if about.get("src") or tag == "link"]
    shown = invoke("view", run)
    assert shown.exit_code == 0, shown.output
    assert "round 1: p1 sample 0" in shown.stdout


def test_without_completions_a_page_has_the_curves(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    done = invoke("view", "--html", tmp_path / "page.html", run)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "page.html").read_text()
    assert len(Page(text).attributes("polyline")) == 1
    assert "--keep-samples" in text
    refused = invoke("view", run)
    assert refused.exit_code == 66
    assert "--keep-samples" in refused.stderr


def test_a_directory_without_metrics_is_no_run(tmp_path: Path) -> None:
    done = invoke("view", "--html", tmp_path / "page.html", tmp_path)
    assert done.exit_code == 66
    assert not (tmp_path / "page.html").exists()
