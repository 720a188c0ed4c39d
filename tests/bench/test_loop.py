"""`bench loop`: both loops train the same weights, so that what it compares is the same work."""

import orjson
import pytest
from conftest import invoke
from preload import dlmctl_script

from dlmctl.bench import loop
from dlmctl.bench.loop import as_pipe
from dlmctl.records.errors import CannotWriteError
from dlmctl.settings.bench import Workload
from dlmctl.settings.compute import Compute


def test_at_lag_zero_the_pipe_trains_the_weights_of_one_process(monkeypatch):
    monkeypatch.setattr(loop, "DLMCTL", (str(dlmctl_script()),))
    line = "loop --rounds 3 --prompts 4 -n 4 --seed 5 --device cpu --json"
    done = invoke("bench", *line.split())
    assert done.exit_code == 0, done.stderr
    rows = [orjson.loads(text) for text in done.stdout.splitlines()]
    assert [row["loop"] for row in rows] == ["one process", "pipe, lag 0", "pipe, lag 1"]
    assert [row["rounds"] for row in rows] == [3, 3, 3]
    alone, piped, _ = rows
    assert piped["same"]
    assert piped["ratio"] == pytest.approx(piped["seconds_per_round"] / alone["seconds_per_round"])


def test_a_stage_that_fails_ends_the_benchmark(tmp_path):
    wrong, compute = Workload("no-such-task", 3, 4, 4, 5), Compute("cpu", "float32", 16)
    with pytest.raises(CannotWriteError, match="a stage of the pipe failed"):
        list(as_pipe("builtin:puzzles", wrong, compute, tmp_path / "run", 0))
