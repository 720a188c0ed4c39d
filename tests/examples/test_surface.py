"""The table of masks and learning rates in examples/rivals: paired by seed, with its intervals."""

from __future__ import annotations

import importlib.util
import json
import math

import pytest
from pages import ROOT


def _load():
    path = ROOT / "examples" / "rivals" / "surface.py"
    spec = importlib.util.spec_from_file_location("rivals_surface", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


surface = _load()


def _runs(directory, solved):
    for (algorithm, masks, rate, seed), share in solved.items():
        path = directory / rate / f"{algorithm}_lawuniform_k{masks}_inner1-{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"accuracy": share}))
    (directory / "1e-4" / "rspo-1.json").write_text("{}")  # a run of another study


def test_cells_are_read_from_names_and_compared_seed_by_seed(tmp_path, capsys):
    _runs(
        tmp_path,
        {
            ("rspo", 1, "1e-4", 1): 0.50,
            ("rspo", 1, "1e-4", 2): 0.40,
            ("rspo", 8, "1e-4", 1): 0.53,
            ("rspo", 8, "1e-4", 2): 0.45,
            ("rspo", 8, "1e-4", 3): 0.90,
            ("rspo", 8, "3e-4", 1): 0.10,
            ("vrpo", 1, "1e-4", 1): 0.45,
        },
    )
    found = surface.read(tmp_path)
    assert found["rspo", 8, 1e-4] == pytest.approx({1: 53, 2: 45, 3: 90})
    lost = surface.differences(found["rspo", 8, 1e-4], found["rspo", 1, 1e-4])
    assert lost == pytest.approx([3, 5])  # the third seed has no partner
    assert surface.good_rates(found, "rspo", 8) == [1e-4]
    surface.tables(found)
    printed = capsys.readouterr().out
    assert "| rspo | +4.0 ± 12.7 (2) |  |" in printed
    assert "| vrpo | 1 | +5.0 (1) |  |" in printed


def test_intervals_are_those_of_student():
    stats = pytest.importorskip("scipy.stats")
    for count in range(2, len(surface.T) + 1):
        values = [float(n * n) for n in range(count)]
        mean, half = surface.interval(values)
        low, high = stats.t.interval(0.95, count - 1, mean, stats.sem(values))
        assert half == pytest.approx((high - low) / 2, rel=3e-3)
    assert math.isnan(surface.interval([3.0])[1])
