"""What `update --algo srpo` says of the weights, by hand."""

import pytest

from dlmctl.records.jsonl import Record
from dlmctl.rl.srpo.credit_metrics import credit_metrics


def record(roles, signal, weights, scored=True, **credit) -> Record:
    said = {"format_ok": True, "baseline": 0.5, "clipped_low": 0.25, "clipped_high": 0.0}
    return Record(
        roles=roles, signal=signal, weights=weights, credit={**said, "scored": scored, **credit}
    )


def test_by_hand():
    batch = [
        record([1, 1, 2, 0], [1.0, 3.0, -1.0, 0.0], [1.1, 1.2, 0.8, 1.0]),
        record([1, 2, 2, 2], [2.0, 0.0, 1.0, 0.0], [1.0, 0.9, 1.0, 0.9], clipped_high=0.5),
        record([1, 0, 0, 2], [0.0] * 4, [1.0] * 4, scored=False, baseline=0.0),
        record([0, 0], [0.0] * 2, [1.0] * 2, scored=False, format_ok=False),
        Record(reward=1.0),
    ]
    found = credit_metrics(batch)
    assert found == {
        "format_ok": 0.75,
        "baseline": 0.5,
        "weight_low": 0.25,
        "weight_high": 0.25,
        "perception_tokens": pytest.approx(4 / 14),
        "perception_signal": 2.0,
        "perception_signal_p10": pytest.approx(1.2),
        "perception_signal_p90": pytest.approx(2.8),
        "perception_weight": pytest.approx(1.1),
        "reasoning_tokens": pytest.approx(5 / 14),
        "reasoning_signal": 0.0,
        "reasoning_signal_p10": pytest.approx(-0.7),
        "reasoning_signal_p90": pytest.approx(0.7),
        "reasoning_weight": pytest.approx(0.9),
    }


def test_nothing_scored_has_no_means():
    found = credit_metrics([record([0], [0.0], [1.0], scored=False, format_ok=False)])
    assert found["format_ok"] == 0
    assert found["perception_tokens"] == 0
    assert found["baseline"] is found["perception_weight"] is found["reasoning_signal_p10"] is None


def test_weights_from_elsewhere_are_not_described():
    assert credit_metrics([Record(weights=[1.0, 2.0])]) == {}
    broken = record([1, 2], [0.0, 1.0], [1.0, 1.0])
    broken["signal"] = ["high"]
    assert "perception_signal" not in credit_metrics([broken])
