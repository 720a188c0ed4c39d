"""Pictures: what is drawn, and that they are pictures."""

import math
import re
import struct

import pytest
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, dump
from dlmctl.report import plots
from dlmctl.report.plots import collect, smoothed
from dlmctl.settings.report import Curves


@pytest.fixture
def metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = [
        {"run": run, "step": s, "reward": s / 20, "kl": 0.1 * s, "applied": True}
        for run in ("a", "b")
        for s in range(20)
    ]
    path.write_bytes(b"".join(map(dump, records)))
    return str(path)


def test_points_are_collected_by_measure_and_line():
    records = [Record(run=r, step=s, reward=s * 2) for r in "ab" for s in range(2)]
    assert collect(records, Curves(["reward"])) == {
        "reward": ({"a": [(0, 0), (1, 2)], "b": [(0, 0), (1, 2)]}, {})
    }


def test_a_measure_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(DataError, match=r"'rewrd'.*there are: run, reward"):
        collect([Record(run="a", reward=1)], Curves(["rewrd"]))


def test_lists_become_rows_of_a_heat_map_and_null_counts_for_nothing():
    records = [
        Record(rollout={"order": [0, 1, None], "remasking": "random"}),
        Record(rollout={"order": [2, 3, None], "remasking": "random"}),
        Record(rollout={"order": [5, None, 4], "remasking": "margin"}),
    ]
    [(points, grid)] = collect(records, Curves(["rollout.order"], by="rollout.remasking")).values()
    assert points == {}
    assert list(grid) == ["random", "margin"]
    assert grid["random"] == pytest.approx([1, 2, math.nan], nan_ok=True)
    assert grid["margin"] == pytest.approx([5, math.nan, 4], nan_ok=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [(([1, 2], [1, 2, 3]), "a list of 2 numbers .* of 3"), ((1, [1, 2]), "a number .* a list")],
)
def test_lists_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(DataError, match=message):
        collect([Record(curve=value) for value in values], Curves(["curve"]))


def test_a_heat_map_shows_its_rows_beside_curves(tmp_path):
    records = [Record(run=r, step=n, curve=[n, 2, None], reward=n) for r in "ab" for n in range(3)]
    source, picture = tmp_path / "r.jsonl", tmp_path / "p.svg"
    source.write_bytes(b"".join(map(dump, records)))
    options = ["-y", "curve", "-y", "reward", "-o", str(picture)]
    result = CliRunner().invoke(app, ["plot", str(source), *options])
    assert result.exit_code == 0, result.output
    assert "<image" in picture.read_text()


def test_a_logarithmic_axis_has_a_place_for_each_decade(tmp_path):
    source, picture = tmp_path / "r.jsonl", tmp_path / "p.svg"
    records = [Record(run="a", tau=10.0 ** (n / 2), loss=n) for n in range(9)]
    source.write_bytes(b"".join(map(dump, [Record(run="a", tau=0, loss=9), *records])))
    line = ["plot", str(source), "-x", "tau", "-y", "loss", "-o", str(picture)]
    turned = ["plot", str(source), "-x", "loss", "-y", "tau", "-o", str(picture)]
    for command, option in ((line, "--log-x"), (turned, "--log-y")):
        for options, wanted in (([option], True), ([], False)):
            result = CliRunner().invoke(app, [*command, *options])
            assert result.exit_code == 0, result.output
            assert ("mathdefault{10^{2}}" in picture.read_text()) == wanted


def test_a_logarithmic_axis_names_its_places_where_they_are_few(tmp_path):
    source, picture = tmp_path / "r.jsonl", tmp_path / "p.svg"
    source.write_bytes(b"".join(dump(Record(run="a", n=n, loss=n)) for n in (32, 64, 1024)))
    line = ["plot", str(source), "-x", "n", "-y", "loss", "--log-x", "-o", str(picture)]
    assert CliRunner().invoke(app, line).exit_code == 0
    places = re.findall(r"<!-- (\S+) -->", picture.read_text())
    assert {"32", "64", "1024"} <= set(places)


def test_more_lines_than_colours_are_dashed(tmp_path):
    source, picture = tmp_path / "r.jsonl", tmp_path / "p.svg"
    records = [Record(run=str(r), step=s, loss=r + s) for r in range(7) for s in range(3)]
    source.write_bytes(b"".join(map(dump, records)))
    line = ["plot", str(source), "-y", "loss", "-o", str(picture)]
    for kept, dashed in ((records, True), (records[:18], False)):
        source.write_bytes(b"".join(map(dump, kept)))
        assert CliRunner().invoke(app, line).exit_code == 0
        assert ("stroke-dasharray" in picture.read_text()) == dashed


@pytest.mark.parametrize("panels", [1, 2])
def test_names_of_any_length_stand_inside_the_picture(panels, monkeypatch):
    monkeypatch.setattr(plots, "saved", lambda figure, kind: figure)
    names = [f"{'masked and visible tokens ' * (n % 2)}{n}" for n in range(7)]
    lines = {name: [(0.0, 1.0), (1.0, 2.0)] for name in names}
    last = {"only here": lines[names[0]]}
    grids = {f"y{n}": (lines | (last if n else {}), {}) for n in range(panels)}
    figure = plots.draw(grids, Curves(list(grids), "x"), "png")
    figure.draw_without_rendering()
    [legend] = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == names + ["only here"] * (panels - 1)
    box, picture = legend.get_window_extent(), figure.bbox
    assert 0 <= box.x0 < box.x1 <= picture.width
    assert 0 <= box.y0 < box.y1 <= picture.height
    assert all(axis.get_window_extent().height > 100 for axis in figure.axes)


def test_smoothing_is_the_mean_of_the_last_points():
    assert smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


def test_a_png_has_its_size_and_an_svg_is_xml(metrics, tmp_path):
    png, svg = tmp_path / "new" / "p.png", tmp_path / "p.svg"
    for path in (png, svg):
        result = CliRunner().invoke(
            app, ["plot", metrics, "-y", "reward", "-y", "kl", "-o", str(path), "--smooth", "3"]
        )
        assert result.exit_code == 0, result.output
    head = png.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:24])
    assert width > 2 * height > 400
    assert svg.read_text().startswith("<?xml")
    assert "reward" in svg.read_text()


def test_a_pipe_gets_a_png(metrics):
    result = CliRunner().invoke(app, ["plot", metrics, "-y", "reward"])
    assert result.stdout_bytes.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "code"),
    [(["-o", "x.pdf"], 2), (["-y", "nothing", "-o", "x.png"], 65), (["-o", "/proc/x/y.png"], 73)],
)
def test_what_cannot_be_drawn_ends_with_its_exit_code(metrics, options, code):
    assert CliRunner().invoke(app, ["plot", metrics, "-y", "reward", *options]).exit_code == code
