"""Similarity, drift and locking on traces made by hand; AUROC and pools by brute force."""

from __future__ import annotations

import itertools

import pytest
import torch

from dlmctl.report.auroc import stratified_auroc
from dlmctl.sae.order.feature_change import ChangeStats, FeatureChange, jaccard, progress
from dlmctl.sae.order.signals import ProposalPool


def test_jaccard_of_sets_written_out() -> None:
    now = torch.tensor([[1, 2, 3], [1, 2, 3], [4, -1, -1], [-1, -1, -1], [7, -1, 2]])
    before = torch.tensor([[3, 1, 9], [5, 6, 7], [-1, 4, 5], [-1, -1, -1], [-1, -1, -1]])
    similarity, shared = jaccard(now, before)
    assert similarity.tolist() == [2 / 4, 0, 1 / 2, 1, 0]
    assert shared.tolist() == [2, 0, 1, 0, 0]


# The strongest feature comes first. Position 0 is decided in step 1, position 1 in step 2, position
# 2 in the last one.
TRACE = [
    ([[1, 2], [5, 6], [8, 9]], "mmm"),
    ([[2, 1], [5, 7], [8, 9]], "mmm"),
    ([[3, 4], [5, 7], [8, 1]], "dmm"),
    ([[3, 9], [1, 2], [9, 1]], "ddm"),
    ([[9, 3], [1, 2], [9, 1]], "ddm"),
]


def _play(stats: ChangeStats, slots: list[int]) -> None:
    """The trace in each of these slots at once."""
    before, was = torch.full((3, 2), -1), torch.zeros(3, dtype=torch.bool)
    for step, (ids, state) in enumerate(TRACE):
        now, masked = torch.tensor(ids), torch.tensor([letter == "m" for letter in state])
        similarity, same = jaccard(now, before)[0], now[:, 0] == before[:, 0]
        row = FeatureChange(similarity, same, masked, was, torch.tensor(step > 0))
        stats.add(
            torch.tensor(slots), FeatureChange(*(torch.stack([part] * len(slots)) for part in row))
        )
        before, was = now, masked


def test_a_trace_made_by_hand() -> None:
    stats = ChangeStats(4, 3)
    _play(stats, [1])
    stats.reset(1)
    _play(stats, [1, 3])
    third = 1 / 3
    pre = [1.0, (third + 1) / 2, (1 + third + third + 1) / 4]
    post = [(1 - third + 0) / 2, 0.0]
    report = stats.report(1)
    assert report == stats.report(3)
    assert report["s_pre"] == pytest.approx(sum(pre) / 3)
    assert report["s_pre_last5"] == report["s_pre"]
    assert report["lock_ratio"] == pytest.approx((0 + 1 + 3 / 4) / 3)
    assert report["jump"] == 1
    assert report["d_post"] == pytest.approx(sum(post) / 2)
    assert report["flips_post"] == (1 + 0) / 2
    places = [report["s_pre_by_position"][bin_] for bin_ in (0, 3, 6)]
    assert places == pytest.approx(pre)
    assert [report["d_post_by_position"][bin_] for bin_ in (0, 3)] == pytest.approx(post)
    assert report["d_post_by_position"][6] is None
    # Shares decided are 0, 1/3 and, twice, 2/3; in the second of them position 1 is seen first.
    curve = report["masked_by_progress"]
    assert (curve[0], curve[3]) == (
        pytest.approx((1 + third + 1) / 3),
        pytest.approx((1 + third) / 2),
    )
    assert curve[6] == pytest.approx((third + 1) / 2)
    assert report["decided_by_progress"][6] == pytest.approx((third + 1 + 1) / 3)
    assert [curve[bin_] for bin_ in (1, 2, 4, 5, 7, 8, 9)] == [None] * 7
    assert all(value in (None, [None] * 10) for value in stats.report(0).values())


def test_the_last_five_steps_alone() -> None:
    stats = ChangeStats(1, 1)
    masked, known = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    for number in range(9):
        similarity = torch.full((1, 1), number / 10, dtype=torch.float64)
        stats.add(torch.tensor([0]), FeatureChange(similarity, masked, masked, masked, known))
    assert stats.report(0)["s_pre_last5"] == pytest.approx((4 + 5 + 6 + 7 + 8) / 50)
    assert stats.report(0)["s_pre"] == pytest.approx(0.4)


def test_bins_of_the_share_that_is_decided() -> None:
    masked = torch.arange(17) >= torch.arange(18)[:, None]
    assert progress(masked, 20).tolist() == [min(19, 20 * n // 17) for n in range(18)]


def _auroc(signal: list[float], right: list[bool], stratum: list[int]) -> float | None:
    pairs = [
        (signal[i] > signal[j]) + (signal[i] == signal[j]) / 2
        for i, j in itertools.product(range(len(signal)), repeat=2)
        if right[i] and not right[j] and stratum[i] == stratum[j]
    ]
    return sum(pairs) / len(pairs) if pairs else None


def test_auroc_counts_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    for number in (1, 2, 7, 60):
        for levels in (2, 5, 1000):
            signal = torch.randint(levels, (number,), generator=generator).double() / 7 - 3
            right = torch.rand(number, generator=generator) < 0.6
            stratum = torch.randint(-3, 3, (number,), generator=generator) * 10**15
            lists = signal.tolist(), right.tolist()
            assert stratified_auroc(signal, right) == pytest.approx(_auroc(*lists, [0] * number))
            assert stratified_auroc(signal, right, stratum) == pytest.approx(
                _auroc(*lists, stratum.tolist())
            )
    assert stratified_auroc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) is None
    assert stratified_auroc(torch.ones(3), torch.ones(3, dtype=torch.bool)) is None


def test_a_clock_says_nothing_within_a_step() -> None:
    step = torch.arange(400) // 8
    right = torch.rand(400, generator=torch.Generator().manual_seed(1)) < step / 50
    assert stratified_auroc(step.double(), right) > 0.7
    assert stratified_auroc(step.double(), right, step) == 0.5


@pytest.mark.parametrize("size", [1, 10, 37, 1000])
def test_a_pool_keeps_whole_units_whatever_their_order(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    numbers = torch.randperm(90, generator=generator) - 45
    units = [numbers[n].repeat(int(numbers[n]) % 4 + 1) for n in range(90)]
    everything = torch.cat(units)
    kept = []
    for seed, together in ((0, 1), (1, 1), (2, 7), (3, 90)):
        order = torch.randperm(90, generator=torch.Generator().manual_seed(seed)).tolist()
        pool = ProposalPool(size)
        for first in range(0, 90, together):
            part = torch.cat([units[n] for n in order[first : first + together]])
            pool.offer({"unit": part, "twice": 2 * part})
        assert pool.seen == len(everything)
        found = pool.columns()
        assert torch.equal(found["twice"], 2 * found["unit"])
        kept.append(found["unit"].tolist())
    assert kept == [kept[0]] * 4
    assert len(kept[0]) <= size
    whole = sorted(everything.tolist())
    assert kept[0] == whole[: len(kept[0])]
    assert len(kept[0]) > size - 4 or len(kept[0]) == len(whole)
