"""Group-relative advantages by hand."""

import math

import pytest

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantage_stage import advantage
from dlmctl.rl.advantages import EPSILON, advantages


def test_the_group_mean_is_taken_away():
    assert advantages([[1, 0, 0, 1], [2, 0]]) == [[0.5, -0.5, -0.5, 0.5], [1, -1]]


def test_leave_one_out_compares_with_the_others():
    [made] = advantages([[1.0, 0.0, 0.5]], baseline="loo")
    assert made == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


def test_no_baseline_leaves_the_reward():
    assert advantages([[1, 0]], baseline="none") == [[1, 0]]


def test_standard_deviations_are_unbiased():
    [made] = advantages([[1, 0]], scale="group")
    std = math.sqrt(0.5)
    assert made == pytest.approx([0.5 / (std + EPSILON), -0.5 / (std + EPSILON)])
    made = advantages([[1, 0], [3, 1]], scale="batch")
    std = math.sqrt((0.25 + 0.25 + 1 + 1) / 3)
    assert made[1] == pytest.approx([1 / (std + EPSILON), -1 / (std + EPSILON)])


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equal_rewards_and_groups_of_one_have_exactly_no_advantage(baseline, scale):
    assert advantages([[0.1, 0.1, 0.1], [0.7]], baseline, scale) == [[0, 0, 0], [0]]


def test_the_stage_holds_one_group_at_a_time():
    seen = []

    def stream():
        for n in range(6):
            seen.append(n)
            yield Record(id=n // 2, reward=float(n % 2))

    out = advantage(stream(), "mean", "none")
    assert next(out)["advantage"] == -0.5
    assert len(seen) == 3
    assert [r["advantage"] for r in out] == [0.5, -0.5, 0.5, -0.5, 0.5]


def test_records_without_reward_are_named():
    record = Record(id="a")
    record.where = "x.jsonl:7"
    with pytest.raises(DataError, match=r"x\.jsonl:7.*'reward' is missing.*verify"):
        list(advantage([record], "mean", "none"))
