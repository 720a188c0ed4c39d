"""Event files as TensorBoard itself reads them back, where it is installed.

pip install 'dlmctl[tensorboard]' && pytest tests/benchmarks/test_tensorboard.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import invoke

pytest.importorskip("tensorboard", reason="tensorboard is not installed")


def _write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(orjson.dumps(r, option=orjson.OPT_APPEND_NEWLINE) for r in records))
    return path


def _scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def _steps(first: int, last: int) -> list[dict[str, Any]]:
    return [
        {"algo": "rspo", "step": n, "reward": n / 8, "applied": n % 2 == 0, "kl": None}
        for n in range(first, last + 1)
    ]


def test_every_number_of_every_step_is_there(tmp_path: Path) -> None:
    _write(tmp_path / "a/metrics.jsonl", [{**r, "grad": {"norm": 2.5}} for r in _steps(1, 3)])
    done = invoke("tensorboard", tmp_path / "a", "-o", tmp_path / "logs")
    assert done.exit_code == 0, done.output
    assert _scalars(tmp_path / "logs/a") == {
        "reward": [(1, 0.125), (2, 0.25), (3, 0.375)],
        "applied": [(1, 0.0), (2, 1.0), (3, 0.0)],
        "grad/norm": [(1, 2.5), (2, 2.5), (3, 2.5)],
    }
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["a"]


def test_a_second_call_adds_what_is_new_and_nothing_twice(tmp_path: Path) -> None:
    metrics, logs = tmp_path / "a/metrics.jsonl", tmp_path / "logs"
    _write(metrics, _steps(1, 3))
    assert invoke("tensorboard", metrics, "-o", logs).exit_code == 0
    before = {p: p.read_bytes() for p in logs.rglob("events.*")}
    assert invoke("tensorboard", metrics, "-o", logs).exit_code == 0
    assert {p: p.read_bytes() for p in logs.rglob("events.*")} == before
    _write(metrics, _steps(1, 5))
    assert invoke("tensorboard", metrics, "-o", logs).exit_code == 0
    assert [step for step, _ in _scalars(logs / "a")["reward"]] == [1, 2, 3, 4, 5]
    assert {p: p.read_bytes() for p in before} == before


def test_lines_of_a_run_and_runs_of_a_file_have_folders(tmp_path: Path) -> None:
    lines = [
        {"layer": layer, "k": 4, "positions": "mask", "step": step, "fve": layer / 4 + step}
        for step in (1, 2)
        for layer in (0, 3)
    ]
    _write(tmp_path / "saes/metrics.jsonl", lines)
    mixed = [{**r, "run": name} for r in _steps(1, 2) for name in ("x", "y/z")]
    other = _write(tmp_path / "all.jsonl", mixed)
    logs = tmp_path / "logs"
    assert invoke("tensorboard", tmp_path / "saes", other, "-o", logs).exit_code == 0
    folders = {str(p.parent.relative_to(logs)) for p in logs.rglob("events.*")}
    names = {f"saes/layer={layer},k=4,positions=mask" for layer in (0, 3)}
    assert folders == names | {"x", "y_z"}
    assert _scalars(logs / "saes/layer=3,k=4,positions=mask") == {"fve": [(1, 1.75), (2, 2.75)]}


def test_a_failure_leaves_no_half_of_a_file(tmp_path: Path) -> None:
    broken = _write(tmp_path / "a/metrics.jsonl", [*_steps(1, 2), {"reward": 1.0}])
    done = invoke("tensorboard", broken, "-o", tmp_path / "logs")
    assert done.exit_code == 65
    assert "metrics.jsonl:3" in done.stderr
    assert not list((tmp_path / "logs").iterdir())


def test_two_runs_of_one_name_are_told_apart_by_the_user(tmp_path: Path) -> None:
    first = _write(tmp_path / "one/a/metrics.jsonl", _steps(1, 2))
    second = _write(tmp_path / "two/a/metrics.jsonl", _steps(1, 2))
    done = invoke("tensorboard", first, second, "-o", tmp_path / "logs")
    assert done.exit_code == 2
    assert "both named a" in done.stderr
