"""Probes of proposals: what is planted is found, what is not is not, and measures by loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from small_world import random_sae

from dlmctl.report.bootstrap import drawn_counts
from dlmctl.sae.order import probing
from dlmctl.sae.order.probing import FOLDS, Proposals, probe_rows
from dlmctl.sae.order.solving import solving_rows
from dlmctl.sae.topk import JumpReluSae, TopKSae

PUZZLES, STEPS, PLACES, WIDTH = 60, 2, 5, 12
COUNT = PUZZLES * STEPS * PLACES


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two penalties, three folds."""
    monkeypatch.setattr(probing, "GRID", (0.1, 0.01))
    monkeypatch.setattr(probing, "FOLDS", 3)


def _sae() -> TopKSae:
    sae = random_sae(WIDTH, 24, 3)
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.W_enc.copy_(sae.W_dec.T)
    return sae.requires_grad_(False)


def _proposals(sae: TopKSae, by: str) -> Proposals:
    """Proposals that are right more often where `by` is high: confidence, or feature 5."""
    generator = torch.Generator().manual_seed(2)
    count = COUNT
    x = 0.3 * torch.randn(count, WIDTH, generator=generator)
    feature = torch.rand(count, generator=generator) < 0.5
    x = x + 2.0 * feature[:, None] * sae.W_dec[5]
    p = 0.2 + 0.7 * torch.rand(count, generator=generator).double()
    odds = (3.0 * feature.double() - 1.5) if by == "codes" else 4 * (p - 0.55)
    right = torch.rand(count, generator=generator) < odds.sigmoid()
    number = torch.arange(count)
    return Proposals(
        right,
        number // PLACES * 977,
        number // (PLACES * STEPS) * 10**12,
        torch.stack([p, p - 0.1, p.log()], dim=1),
        x,
    )


def _rows(proposals: Proposals, sae: TopKSae, seed: int = 0) -> dict[str, dict[str, Any]]:
    return {row["probe"]: row for row in probe_rows(proposals, sae, seed)}


@pytest.mark.usefixtures("quick")
def test_a_planted_feature_is_found_and_adds_to_confidence() -> None:
    sae = _sae()
    rows = _rows(_proposals(sae, "codes"), sae)
    assert rows["codes"]["auroc_choice"] > 0.75
    assert abs(rows["confidence"]["auroc_choice"] - 0.5) < 0.1
    for name in ("codes", "confidence+codes", "activations"):
        for gain in ("auroc_gain", "nll_gain"):
            assert rows[name][gain] > 4 * rows[name][f"{gain}_se"] > 0
    assert rows["confidence"]["auroc_gain"] is rows["random"]["nll_over_random"] is None
    for name, other in (("codes", "random"), ("confidence+codes", "confidence+random")):
        gap = rows[name]["auroc_choice"] - rows[other]["auroc_choice"]
        assert rows[name]["auroc_over_random"] == pytest.approx(gap)
        gap = rows[other]["nll"] - rows[name]["nll"]
        assert rows[name]["nll_over_random"] == pytest.approx(gap)
    assert rows["codes"]["train"] + rows["codes"]["test"] == COUNT
    assert (rows["codes"]["puzzles"], rows["codes"]["test_puzzles"]) == (60, 30)


@pytest.mark.usefixtures("quick")
def test_codes_that_know_nothing_add_nothing() -> None:
    sae = _sae()
    rows = _rows(_proposals(sae, "confidence"), sae)
    assert rows["confidence"]["auroc_choice"] > 0.65
    for name in ("codes", "activations", "random"):
        assert abs(rows[name]["auroc_choice"] - 0.5) < 0.1
        joined = rows[f"confidence+{name}"]
        for gain in ("auroc_gain", "nll_gain"):
            assert joined[gain] < 3 * joined[f"{gain}_se"]
        assert joined["auroc_choice"] > rows["confidence"]["auroc_choice"] - 0.05


def test_puzzles_do_not_straddle_halves_or_folds() -> None:
    puzzle = torch.arange(63).repeat_interleave(4) * 10**9
    half, folds = probing._divided(puzzle, 3)
    for part in (half, folds):
        assert torch.equal(part, part[::4].repeat_interleave(4))
    assert half[::4].bincount().tolist() == [32, 31]
    for number in (0, 1):
        counts = folds[::4][half[::4] == number].bincount(minlength=FOLDS)
        assert counts.max() - counts.min() <= 1
    assert not torch.equal(half, probing._divided(puzzle, 4)[0])


def _within(scores: list[float], right: list[bool], unit: list[int]) -> tuple[float, int]:
    """Pairs of one choice that are in the right order, and pairs, by loops."""
    wins = [
        (scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
        for i, j in itertools.product(range(len(scores)), repeat=2)
        if unit[i] == unit[j] and right[i] and not right[j]
    ]
    return sum(wins), len(wins)


def test_measures_are_those_of_loops_also_for_resamples() -> None:
    test = _proposals(_sae(), "codes").chosen(torch.arange(COUNT) < 100)  # ten puzzles
    scores = torch.randint(4, (100,), generator=torch.Generator().manual_seed(1)).double() - 2
    found = probing._Judged(test, 7).measures(scores)
    counts = [[1] * 10, *drawn_counts(10, probing.RESAMPLES, 7)[:4].long().tolist()]
    rows = test.puzzle.tolist()
    for number, drawn in enumerate(counts):
        wins = pairs = loss = size = 0.0
        for puzzle, times in zip(sorted(set(rows)), drawn, strict=True):
            own = [n for n, name in enumerate(rows) if name == puzzle]
            parts = [
                [column.tolist()[n] for n in own] for column in (scores, test.right, test.unit)
            ]
            won, compared = _within(*parts)
            wins, pairs = wins + times * won, pairs + times * compared
            nll = [math.log1p(math.exp(-s if r else s)) for s, r in zip(*parts[:2], strict=True)]
            loss, size = loss + times * sum(nll), size + times * len(own)
        assert float(found["auroc_choice"][number]) == pytest.approx(wins / pairs)
        assert float(found["nll"][number]) == pytest.approx(loss / size)


def test_the_control_has_random_unit_directions_and_the_same_size() -> None:
    sae = _sae()
    with torch.no_grad():
        sae.b_dec.fill_(0.3)
    coded = probing._encoded(sae, torch.randn(9, WIDTH))
    control = probing._random(sae, coded, 1)
    assert (control.k, control.W_enc.shape) == (sae.k, sae.W_enc.shape)
    torch.testing.assert_close(control.W_enc.norm(dim=0), torch.ones(24))
    assert torch.equal(control.b_dec, sae.b_dec)
    codes = probing._encoded(control, torch.randn(9, WIDTH))
    assert codes.indices.shape == (9, 3)
    assert not torch.equal(control.W_enc, probing._random(sae, coded, 2).W_enc)


@pytest.mark.usefixtures("quick")
def test_an_autoencoder_with_thresholds_is_probed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dlmctl.sae.chunks.NUMBERS", 7 * 24)
    sae = JumpReluSae(WIDTH, 24)
    sae.load_state_dict({**_sae().state_dict(), "threshold": torch.linspace(0.1, 1, 24)})
    proposals = _proposals(sae.requires_grad_(False), "codes")
    codes = probing._encoded(sae, proposals.x)
    active = float((codes.values > 0).sum(dim=1).double().mean())
    assert probing._random(sae, codes, 0).k == round(active)
    assert _rows(proposals, sae)["codes"]["auroc_choice"] > 0.75


def test_what_cannot_be_probed_is_said() -> None:
    sae, every = _sae(), _proposals(_sae(), "codes")
    few = every.chosen(torch.arange(COUNT) < STEPS * PLACES * 2 * FOLDS)
    [row] = probe_rows(few, sae, 0)
    assert row == {
        "probe": None,
        "reason": f"a half has {FOLDS} puzzles, and a probe takes at least {2 * FOLDS}",
    }
    [row] = probe_rows(every._replace(right=torch.ones(COUNT, dtype=torch.bool)), sae, 0)
    assert row["reason"] == "all proposals are right"
    [row] = probe_rows(every._replace(unit=torch.arange(COUNT)), sae, 0)
    assert row["reason"] == "no choice has both a right and a wrong proposal"


def test_correlations_with_solving_and_their_errors() -> None:
    generator = torch.Generator().manual_seed(4)
    right = torch.rand(300, generator=generator) < 0.4
    value = torch.randn(300, generator=generator).double() + 0.5 * right
    missing = value.clone()
    missing[::3] = torch.nan
    columns = {
        "puzzle": torch.arange(300),
        "right": right,
        "s_pre": value,
        "d_post": missing,
        "jump": torch.ones(300, dtype=torch.float64),
    }
    first, part, none = solving_rows(columns, ("s_pre", "d_post", "jump"), 0)
    expected = float(torch.corrcoef(torch.stack([value, right.double()]))[0, 1])
    assert first["correlation"] == pytest.approx(expected)
    assert first["correlation_se"] == pytest.approx((1 - expected**2) / math.sqrt(300), rel=0.15)
    assert first["solved"] == pytest.approx(float(right.double().mean()))
    assert part["completions"] == 200
    assert (none["correlation"], none["correlation_se"]) == (None, None)
    # Copies of a puzzle's completion tell nothing new.
    four = {name: column.repeat(4) for name, column in columns.items()}
    again = solving_rows(four, ("s_pre",), 0)[0]
    assert again["correlation_se"] == pytest.approx(first["correlation_se"])
