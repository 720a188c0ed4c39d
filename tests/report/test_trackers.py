"""What trackers have of a run, over crashes and resumes: each step of metrics.jsonl once.

The clients are the real ones, in their forms without a server; where one is not installed its tests
are skipped. pip install wandb trackio mlflow tensorboard
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import invoke

from dlmctl.commands.tracking import tracked
from dlmctl.report import follower, trackers
from dlmctl.report.follower import Follower
from dlmctl.train.run_directory import forget_steps

Points = dict[str, list[tuple[int, float]]]
"""From the name of a measure to its steps and values, in their order."""

TRAINER = """
import json, os, signal, sys
from pathlib import Path
from dlmctl.commands.tracking import tracked
name, run, way, *lines = sys.argv[1:]
with tracked([name], Path(run), {"lr": 0.25, "masks": "independent"}):
    with open(Path(run) / "metrics.jsonl", "ab", 0) as stream:
        for line in lines:
            stream.write(line.encode() + b"\\n")
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
"""
"""A trainer that appends lines to its metrics, and is killed before anybody has read them."""


def record(step: int) -> dict[str, Any]:
    """Numbers that float32 has exactly."""
    extra = {"cosine": step / 16} if step % 3 == 0 else {}
    return {"algo": "sft", "step": step, "loss": 8 - step / 8, "kl": None, "at": 0, **extra}


def train(name: str, run: Path, records: list[dict[str, Any]], way: str = "ends") -> None:
    """A process that trains, which ends before its followers may have."""
    run.mkdir(exist_ok=True)
    lines = [json.dumps(line) for line in records]
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, name, str(run), way, *lines],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == (-signal.SIGKILL if way == "killed" else 0), done.stderr
    assert "takes no metrics" not in done.stderr, done.stderr


def settled(run: Path, name: str) -> None:
    """Wait until no process sends the metrics of a run any more."""
    until = time.monotonic() + 120
    while (run / "trackers" / f".{name}.lock").exists() and time.monotonic() < until:
        time.sleep(0.1)


@pytest.fixture(params=["wandb", "trackio", "mlflow", "tensorboard"])
def name(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tracker that is installed, and keeps what it is sent in this test's directory."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # Its default, a database, takes a minute to make where a core is busy.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    return str(request.param)


def of_wandb(run: Path) -> Points:
    """The points of all files of the run, read by their format: that of LevelDB's logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    points: Points = defaultdict(list)
    ids = set()
    for path in sorted((run / "trackers/wandb").glob("offline-run-*/*.wandb")):
        ids.add(path.stem)
        data, at, parts = path.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if at % 32768 > 32768 - 7:
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", data[at : at + 7])
            parts = (
                data[at + 7 : at + 7 + size] if kind in (1, 2) else parts + data[at + 7 :][:size]
            )
            at += 7 + size
            if kind in (1, 4):
                _wandb_row(Record.FromString(parts), points)
    assert len(ids) == 1
    return points


def _wandb_row(found: Any, points: Points) -> None:
    if found.WhichOneof("record_type") != "history":
        return
    row = {
        (item.key or "/".join(item.nested_key)): json.loads(item.value_json)
        for item in found.history.item
    }
    for key, value in row.items():
        line = key.rpartition("/")[0]
        step = row[f"{line}/step"] if line else row["_step"]
        if not key.startswith("_") and not key.endswith("/step"):
            points[key].append((step, value))


def of_trackio(run: Path) -> Points:
    """As its database has them."""
    code = """
import json, sys
from trackio.api import Api
from trackio.sqlite_storage import SQLiteStorage
[known] = Api().runs("dlmctl")
assert known.config["masks"] == "independent"
rows = SQLiteStorage.get_logs("dlmctl", known.name)
json.dump([{k: v for k, v in row.items() if k != "timestamp"} for row in rows], sys.stdout)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    points: Points = defaultdict(list)
    for row in json.loads(done.stdout):
        for key, value in row.items():
            if key != "step" and not key.endswith("/step"):
                points[key].append((row["step"], value))
    return points


def of_mlflow(run: Path) -> Points:
    """As its client tells them."""
    import mlflow

    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("dlmctl")
    assert experiment is not None
    [found] = client.search_runs([experiment.experiment_id])
    assert found.data.params["masks"] == "independent"
    assert found.info.status == "FINISHED"
    return {
        key: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, key)]
        for key in found.data.metrics
    }


def of_tensorboard(run: Path) -> Points:
    """As TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: Points = {}
    folders = {file.parent for file in (run / "tensorboard").rglob("events.*")}
    for folder in folders:
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        line = "" if folder.name == "tensorboard" else f"{folder.name}/"
        for tag in events.Tags()["scalars"]:
            points[line + tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return points


READ: Mapping[str, Callable[[Path], Points]] = {
    "wandb": of_wandb,
    "trackio": of_trackio,
    "mlflow": of_mlflow,
    "tensorboard": of_tensorboard,
}


def expected(records: list[dict[str, Any]]) -> Points:
    """The points of records."""
    points: Points = defaultdict(list)
    for line in records:
        for key, value in line.items():
            if isinstance(value, int | float) and key != "step":
                points[key].append((line["step"], value))
    return points


def test_each_step_is_there_once_after_a_crash_and_a_resume(name: str, tmp_path: Path) -> None:
    run = tmp_path / "a"
    steps = [record(step) for step in range(1, 12)]
    train(name, run, steps[:8], "killed")
    # Lost with the process: what was behind the newest checkpoint. The former follower may be
    # sending while the run resumes, and while the file is cut.
    forget_steps(run / "metrics.jsonl", 6)
    train(name, run, steps[6:9], "killed")
    train(name, run, steps[9:])
    settled(run, name)
    assert READ[name](run) == expected(steps)


def test_a_step_that_was_sent_but_not_noted_is_not_sent_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "wandb":
        pytest.skip("wandb cannot be asked for its steps offline")
    run = tmp_path / "a"
    steps = [record(step) for step in range(1, 7)]
    train(name, run, steps[:4])
    settled(run, name)
    note = run / "trackers" / f"{name}.json"
    known = json.loads(note.read_text())
    note.write_text(json.dumps({**known, "steps": {"": 2}}))
    train(name, run, steps[4:])
    assert READ[name](run) == expected(steps)


def test_autoencoders_of_a_run_have_steps_of_their_own(name: str, tmp_path: Path) -> None:
    run = tmp_path / "saes"
    lines = [
        {"layer": layer, "k": 4, "positions": "mask", "step": step, "fve": layer / 4 + step}
        for layer, step in [(0, 1), (0, 2), (0, 3), (3, 1), (3, 2), (0, 4), (3, 3)]
    ]
    train(name, run, lines[:4], "killed")
    train(name, run, lines[4:])
    settled(run, name)
    points = {key: sorted(found) for key, found in READ[name](run).items()}
    assert sorted(points.values()) == [
        [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)],
        [(1, 1.75), (2, 2.75), (3, 3.75)],
    ]
    assert all("layer" in key and key.endswith("/fve") for key in points)


def test_evaluations_have_the_steps_of_their_checkpoints(name: str, tmp_path: Path) -> None:
    run = tmp_path / "a"
    lines = [
        line
        for step in range(1, 5)
        for line in ({"step": step, "loss": 1 / step}, {"step": step, "eval": {"reward": step / 4}})
    ]
    train(name, run, lines[:4], "killed")
    train(name, run, lines[4:])
    settled(run, name)
    points = {key: sorted(found) for key, found in READ[name](run).items()}
    [evaluated] = [found for key, found in points.items() if key.endswith("eval/reward")]
    assert evaluated == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    [losses] = [found for key, found in points.items() if key.endswith("loss")]
    assert [step for step, _ in losses] == [1, 2, 3, 4]


class Server:
    """A tracker in a file, that can be away, and can be asked."""

    away = False

    def __init__(self, memory: trackers.Memory, about: Mapping[str, Any]) -> None:
        self._file, self.where = memory.directory / "server", "a file"
        self._connect()
        memory.run = memory.run or "1"
        rows = self._file.read_text().splitlines() if self._file.exists() else []
        memory.steps = {"": max((json.loads(row)["step"] for row in rows), default=-1)}

    def _connect(self) -> None:
        if Server.away:
            raise ConnectionError("no route to host\nand a long explanation")

    def add(self, line: str, step: int, numbers: Mapping[str, float]) -> None:
        self._connect()
        with self._file.open("a") as stream:
            stream.write(json.dumps({"step": step, **numbers}) + "\n")

    def close(self, whole: bool) -> None:
        self._connect()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a follower of `Server` says; it tries again without waiting."""
    monkeypatch.setitem(trackers.KINDS, "trackio", Server)
    monkeypatch.setattr(follower, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(Server, "away", False)
    return []


def append(run: Path, *steps: int) -> None:
    with (run / "metrics.jsonl").open("a") as stream:
        for step in steps:
            stream.write(json.dumps(record(step)) + "\n")


def sent(run: Path) -> list[int]:
    return [json.loads(row)["step"] for row in (run / "server").read_text().splitlines()]


def test_what_a_server_did_not_take_is_sent_when_it_answers(
    tmp_path: Path, said: list[str]
) -> None:
    follow = Follower("trackio", tmp_path, {}, said.append)
    follow.catch_up()
    append(tmp_path, 1, 2)
    follow.catch_up()
    Server.away = True
    for step in (3, 4, 5):
        append(tmp_path, step)
        follow.catch_up()
    assert sent(tmp_path) == [1, 2]
    Server.away = False
    append(tmp_path, 6)
    follow.catch_up()
    follow.close(whole=True)
    assert sent(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [line for line in said if "takes no metrics (no route to host);" in line] == said[1:2]
    assert said[2:] == ["trackio takes metrics again; none is missing"]


def test_what_is_left_at_the_end_is_sent_when_the_run_resumes(
    tmp_path: Path, said: list[str]
) -> None:
    Server.away = True
    append(tmp_path, 1, 2)
    first = Follower("trackio", tmp_path, {}, said.append)
    first.catch_up(last=True)
    first.close(whole=True)
    assert len(said) == 1
    Server.away = False
    append(tmp_path, 3)
    Follower("trackio", tmp_path, {}, said.append).catch_up()
    assert sent(tmp_path) == [1, 2, 3]


def test_half_a_line_waits_for_its_other_half(tmp_path: Path, said: list[str]) -> None:
    follow = Follower("trackio", tmp_path, {}, said.append)
    append(tmp_path, 1)
    whole = json.dumps(record(2)) + "\n"
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        for part in (whole[:9], whole[9:]):
            stream.write(part)
            stream.flush()
            follow.catch_up()
    assert sent(tmp_path) == [1, 2]


def test_a_file_that_was_cut_and_grew_again_loses_no_step(tmp_path: Path, said: list[str]) -> None:
    follow = Follower("trackio", tmp_path, {}, said.append)
    append(tmp_path, 1, 2, 3)
    follow.catch_up()
    forget_steps(tmp_path / "metrics.jsonl", 1)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        for step in (2, 3, 4, 5):
            stream.write(json.dumps({**record(step), "at": 123456}) + "\n")
    follow.catch_up()
    assert sent(tmp_path) == [1, 2, 3, 4, 5]


def test_a_run_says_which_steps_the_tracker_has_of_before(tmp_path: Path, said: list[str]) -> None:
    append(tmp_path, 1, 2, 3, 4)
    Follower("trackio", tmp_path, {}, said.append).catch_up()
    forget_steps(tmp_path / "metrics.jsonl", 2)
    (tmp_path / "trackers/trackio.json").write_text('{"run": "1", "steps": {"": 1}}')
    said.clear()
    Follower("trackio", tmp_path, {}, said.append).catch_up()
    assert any("has steps up to 4" in line for line in said)
    assert sent(tmp_path) == [1, 2, 3, 4]


def test_only_the_first_rank_has_followers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with tracked(["wandb,mlflow,trackio,tensorboard"], tmp_path, {}):
        append(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "command",
    [
        ["update", "--algo", "sft", "none.jsonl"],
        ["sae-train", "none.jsonl"],
        ["distill", "teacher", "none.npy"],
        ["distill", "cd", "none.npy"],
        ["distill", "lcm", "none.jsonl", "--teacher", "none"],
        ["distill", "masked", "none.jsonl"],
    ],
)
def test_trackers_are_refused_before_anything_is_read(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    wrong = invoke(*command, "-o", run, "--log", "tensorboard,comet")
    monkeypatch.setitem(sys.modules, "wandb", None)
    missing = invoke(*command, "-o", run, "--log", "wandb")
    assert missing.exit_code == 69
    assert "pip install 'dlmctl[wandb]'" in missing.stderr
    assert wrong.exit_code == 2
    assert "comet is none of trackio, wandb" in wrong.stderr
    assert not run.exists()
