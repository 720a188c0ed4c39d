"""Fronts of steering against values computed by hand, and their errors against formulas."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.sae.steering.fronts import crossing, front_rows
from dlmctl.sae.steering.scores import Outcome
from dlmctl.sae.steering.twins import Treatment

FIRST = Treatment("saes/a", 3, 7, 1.0, "all", None)


def _outcome(gain: float, cost: float, prompt: int = 0, before: float = 50.0) -> Outcome:
    perplexity = 10.0, 10.0 * math.exp(cost)
    return Outcome((before, before + 100 * gain), perplexity, 0, prompt, push=gain)


def _points(*points: tuple[float, float, float], feature: int = 7, prompts: int = 2):
    return [
        (FIRST._replace(amplitude=amplitude, feature=feature), _outcome(gain, cost, prompt))
        for amplitude, gain, cost in points
        for prompt in range(prompts)
    ]


def test_a_front_is_linear_between_its_amplitudes_and_begins_at_nothing() -> None:
    outcomes = _points((4.0, 0.4, 0.3), (2.0, 0.3, 0.1), (0.0, 0.0, 0.0))
    for level, gain, amplitude in (
        (0.05, 0.15, 1.0),
        (0.1, 0.3, 2.0),
        (0.2, 0.35, 3.0),
        (0.3, 0.4, 4.0),
    ):
        [row] = front_rows(outcomes, math.expm1(level - 1e-12), 0, False)
        assert (row["C"], row["push"]) == (pytest.approx(gain), pytest.approx(gain))
        assert row["C_share"] == pytest.approx(2 * gain)
        assert row["amplitude"] == pytest.approx(amplitude)
        assert row["log_ppl_ratio"] == pytest.approx(level)
        assert (row["amplitudes"], row["prompts"], row["reached"]) == ([2.0, 4.0], 2, 1.0)
        assert (row["C_se"], row["reason"], row["bound"]) == (pytest.approx(0), None, False)


def test_the_first_place_counts_where_a_front_reaches_the_cost() -> None:
    cost = torch.tensor([[0.0, 0.4, 0.1, 0.4], [0.0, -0.2, 0.1, 0.3]], dtype=torch.float64)
    gain = torch.tensor([[0.0, 0.8, 0.9, 1.0], [0.0, 0.1, 0.4, 0.6]], dtype=torch.float64)
    where = crossing(cost, 0.2)
    assert where.reached.all()
    torch.testing.assert_close(where.read(gain), torch.tensor([0.4, 0.5], dtype=torch.float64))
    assert crossing(cost, 0.35).reached.tolist() == [True, False]


def test_a_cost_that_is_not_reached_gives_no_number_but_a_reason() -> None:
    reaches = _points((1.0, 0.2, 0.1), (2.0, 0.6, 0.3))
    cheap = _points((1.0, 0.2, 0.01), (2.0, 0.6, 0.0499), feature=8)
    first, second, mean = front_rows([*reaches, *cheap], 0.2, 0, None)
    assert first["C"] == pytest.approx(0.2 + 0.4 * (math.log(1.2) - 0.1) / 0.2)
    assert (second["C"], second["C_se"], second["reached"]) == (None, None, 0.0)
    assert second["reason"] == f"the highest cost is {math.expm1(0.0499):+.1%}"
    assert (mean["feature"], mean["features"], mean["C"]) == ("all", 2, None)
    assert mean["reason"] == "1 of 2 features do not reach this cost"
    dear = _points((1.0, 0.1, 0.1), (2.0, 0.2, 0.3), feature=8)
    *_, mean = front_rows([*reaches, *dear], 0.2, 0, None)
    assert mean["C"] == pytest.approx(
        sum(row["C"] for row in front_rows(reaches + dear, 0.2, 0, None)[:2]) / 2
    )


def test_what_has_one_amplitude_or_no_perplexity_is_no_front() -> None:
    assert front_rows([], 0.2, 0, None) == []
    assert front_rows(_points((0.0, 0.0, 0.0), (2.0, 0.6, 0.3)), 0.2, 0, None) == []
    assert front_rows(_points((-2.0, 0.6, 0.3), (2.0, 0.6, 0.3)), 0.2, 0, None) == []
    silent = [
        (t, o._replace(perplexity=None)) for t, o in _points((1.0, 0.1, 0.1), (2.0, 0.6, 0.3))
    ]
    assert front_rows(silent, 0.2, 0, None) == []
    rows = front_rows(_points((-1.0, 0.1, 0.1), (-2.0, 0.6, 0.3)), 0.2, 0, None)
    assert -2 < rows[0]["amplitude"] < -1


def test_the_error_is_that_of_a_mean_over_prompts_if_the_cost_is_certain() -> None:
    draw = random.Random(5)
    gains = [draw.gauss(0.3, 0.2) for _ in range(80)]
    outcomes = [
        (FIRST._replace(amplitude=amplitude), _outcome(amplitude * gain, amplitude * 0.1, prompt))
        for prompt, gain in enumerate(gains)
        for amplitude in (1.0, 3.0)
    ]
    [row] = front_rows(outcomes, math.expm1(0.2), 0, None)
    assert row["C"] == pytest.approx(2 * statistics.fmean(gains))
    assert row["C_se"] == pytest.approx(2 * statistics.stdev(gains) / math.sqrt(80), rel=0.1)
    assert row == front_rows(outcomes, math.expm1(0.2), 0, None)[0]
    assert row["C_se"] != front_rows(outcomes, math.expm1(0.2), 1, None)[0]["C_se"]
    # Fifty samples of each prompt are no more prompts.
    [again] = front_rows(outcomes * 50, math.expm1(0.2), 0, None)
    assert again["C_se"] == pytest.approx(row["C_se"])


def test_an_error_knows_of_resamples_that_do_not_reach_the_cost() -> None:
    outcomes = [
        (FIRST._replace(amplitude=amplitude), _outcome(0.1, cost * amplitude, prompt))
        for prompt, cost in enumerate([0.0, 0.0, 0.0, 0.4])
        for amplitude in (1.0, 2.0)
    ]
    [row] = front_rows(outcomes, math.expm1(0.15), 0, None)
    # Reached unless the one dear prompt is not drawn: 1 - (3/4)^4.
    assert row["reached"] == pytest.approx(1 - 0.75**4, abs=0.05)


def test_the_command_writes_fronts_behind_rows_and_plot_draws_them(tmp_path: Path) -> None:
    def record(number: int, score: float, ppl: float, amplitude: float | None) -> dict[str, Any]:
        rollout: dict[str, Any] = {"seed": 1}
        if amplitude is not None:
            rollout |= {"steer": [{**FIRST.fields(), "amplitude": amplitude, "unit": "norm"}]}
            rollout |= {"push": amplitude}
        text = {"prompt": "a", "completion": "b", "score": score, "ppl": ppl}
        return {"id": number, "sample": 0, **text, "rollout": rollout}

    plain = [record(n, 50, 10, None) for n in range(3)]
    steered = [record(n, 50 + 20 * a, 10 * (1 + a), a) for n in range(3) for a in (0.1, 0.5)]
    for name, lines in (("b", plain), ("s", steered)):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    line = ["sae-steering", "--baseline", str(tmp_path / "b"), "--concept-from", "score"]
    line += ["--perplexity", "ppl", "--at-cost", "0.3", str(tmp_path / "s")]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.stderr
    *rows, front = [json.loads(row) for row in done.stdout.splitlines()]
    assert [(r["row"], r["amplitude"], r["push"]) for r in rows] == [
        ("amplitude", 0.1, pytest.approx(0.1)),
        ("amplitude", 0.5, pytest.approx(0.5)),
    ]
    part = math.log(1.3 / 1.1) / math.log(1.5 / 1.1)
    assert (front["row"], front["unit"], front["at_cost"]) == ("front", "norm", 0.3)
    assert front["C"] == pytest.approx(0.02 + 0.08 * part)
    assert front["push"] == pytest.approx(0.1 + 0.4 * part)
    (tmp_path / "rows").write_text(done.stdout)
    picture = ["plot", "-x", "log_ppl_ratio", "-y", "C", "--by", "feature", "-o"]
    drawn = CliRunner().invoke(app, [*picture, str(tmp_path / "f.svg"), str(tmp_path / "rows")])
    assert drawn.exit_code == 0, drawn.stderr
    assert "log_ppl_ratio" in (tmp_path / "f.svg").read_text()
