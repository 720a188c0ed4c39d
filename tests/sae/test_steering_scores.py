"""Scores of steering by hand, and texts beside their twins."""

from __future__ import annotations

import math
import random
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from steered_records import FIRST, completion, written

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, read_records
from dlmctl.sae.steering.scores import Outcome, outcomes_of, rows_of
from dlmctl.sae.steering.twins import (
    read_baseline,
    read_sampled_text,
    read_twins,
)


def test_scores_by_hand() -> None:
    outcomes = [
        (FIRST, Outcome((20, 60), (10.0, 12.0))),  # C 0.4, P -0.2
        (FIRST, Outcome((50, 40), (8.0, 4.0))),  # C -0.1, P 0.5
    ]
    [row] = rows_of(outcomes, 0.3, bound=False)
    assert row["C"] == pytest.approx(0.15)
    assert row["P"] == pytest.approx(0.15)
    assert row["S"] == pytest.approx(0.15 + 0.3 * 0.15)
    assert (row["c_before"], row["c_after"]) == (35, 50)
    assert (row["ppl_before"], row["ppl_after"]) == (9, 8)
    assert (row["n"], row["n_C"], row["n_P"], row["failed"], row["bound"]) == (2, 2, 2, 0, False)
    assert {name: row[name] for name in FIRST._fields} == {**FIRST._asdict()}
    assert row["C_share"] == pytest.approx(0.15 / 0.65)
    assert row["log_ppl_ratio"] == pytest.approx((math.log(1.2) + math.log(0.5)) / 2)
    assert row["ppl_ratio"] == pytest.approx(math.sqrt(0.6))


def test_errors_count_prompts_and_not_completions() -> None:
    gains = {"a": [0.4, 0.6], "b": [0.1], "c": [-0.2, 0.3, 0.2]}
    outcomes = [
        (FIRST, Outcome((20, 20 + 100 * gain), (10.0, 10.0 * (1 - gain)), 0, prompt))
        for prompt, values in gains.items()
        for gain in values
    ]
    [row] = rows_of(outcomes, 0.5)
    mean = sum(sum(values) for values in gains.values()) / 6
    sums = [sum(values) - len(values) * mean for values in gains.values()]
    error = math.sqrt(3 / 2 * sum(s * s for s in sums)) / 6
    assert row["C_se"] == row["P_se"] == pytest.approx(error)
    assert row["C_share_se"] == pytest.approx(error / 0.8)  # c_before is 20 everywhere
    assert row["S_se"] == pytest.approx(1.5 * error)  # C and P are the same numbers
    once = [(FIRST, outcome._replace(prompt=n)) for n, (_, outcome) in enumerate(outcomes)]
    [row] = rows_of(once, 0.5)
    flat = [gain for values in gains.values() for gain in values]
    assert row["C_se"] == pytest.approx(statistics.stdev(flat) / math.sqrt(6))
    [row] = rows_of([(FIRST, outcome._replace(prompt="a")) for _, outcome in outcomes], 0.5)
    assert (row["C"], row["C_se"]) == (pytest.approx(mean), None)


def test_the_share_of_the_possible_gain_has_the_error_of_a_ratio() -> None:
    """The jackknife over prompts is another way to the same number."""
    draw = random.Random(3)
    outcomes = []
    for prompt in range(200):
        before = draw.uniform(0, 60)
        after = before + draw.uniform(-10, 40)
        outcomes.append((FIRST, Outcome((before, after), None, 0, prompt)))
    [row] = rows_of(outcomes, 0.3)
    left = [rows_of(outcomes[:n] + outcomes[n + 1 :], 0.3)[0]["C_share"] for n in range(200)]
    jackknife = math.sqrt(199 * statistics.pvariance(left))
    assert row["C_share_se"] == pytest.approx(jackknife, rel=0.02)


def test_the_error_of_several_features_knows_that_they_share_prompts() -> None:
    other, outcomes = FIRST._replace(feature=8), []
    for prompt, (first, second) in enumerate([(0.1, -0.1), (0.4, -0.4), (0.2, -0.2)]):
        outcomes += [(FIRST, Outcome((0, 100 * first), None, 0, prompt))]
        outcomes += [(other, Outcome((50, 50 + 100 * second), None, 0, prompt))]
    *_, summary = rows_of(outcomes, 0.3)
    assert (summary["C"], summary["C_se"]) == (pytest.approx(0), pytest.approx(0))


def test_one_text_without_sense_moves_the_mean_and_not_the_rest() -> None:
    outcomes = [
        (FIRST, Outcome((0, 50), (10.0, 160.0))),  # P -15
        (FIRST, Outcome((0, 40), (10.0, 8.0))),  # P 0.2
        (FIRST, Outcome((0, 0), (10.0, 5.0))),  # P 0.5
    ]
    [row] = rows_of(outcomes, 0.3)
    assert row["P"] == pytest.approx((-15 + 0.2 + 0.5) / 3)
    assert row["P_median"] == pytest.approx(0.2)
    assert row["P_clipped"] == pytest.approx((-1 + 0.2 + 0.5) / 3)
    assert row["S"] == pytest.approx(0.3 + 0.3 * row["P"])
    assert row["S_clipped"] == pytest.approx(0.3 - 0.03)
    # 0.5 - 4.5, 0.4 + 0.06, 0 + 0.15
    assert row["S_median"] == pytest.approx(0.15)
    assert row["C_median"] == pytest.approx(0.4)


def test_completions_are_averaged_before_features_and_ways_stay_apart() -> None:
    other = FIRST._replace(feature=8)
    outcomes = [(FIRST, Outcome((0, 100), None))] * 3
    outcomes += [(other, Outcome((0, 0), (4.0, 2.0))), (other, Outcome(None, (4.0, 4.0), failed=1))]
    outcomes += [(FIRST._replace(amplitude=4.0), Outcome((0, 10), None))]
    *features, whole = rows_of(outcomes, 0.5)
    assert [(r["feature"], r["amplitude"], r["n"]) for r in features] == [
        (7, 2.0, 3),
        (8, 2.0, 2),
        (7, 4.0, 1),
    ]
    assert [r["S"] for r in features] == [None, 0 + 0.5 * 0.25, None]
    assert [(r["n_C"], r["n_P"], r["failed"]) for r in features] == [
        (3, 0, 0),
        (1, 2, 1),
        (1, 0, 0),
    ]
    assert (whole["feature"], whole["features"], whole["amplitude"]) == ("all", 2, 2.0)
    assert (whole["n"], whole["n_C"], whole["n_P"], whole["failed"]) == (5, 4, 2, 1)
    assert whole["C"] == 0.5  # and not 0.75, the mean over completions
    assert (whole["P"], whole["S"]) == (0.25, 0.125)


@pytest.mark.parametrize(
    ("plain", "steered", "message"),
    [
        ({}, {"sample": 1}, r"s:1: no baseline has id 'p0' and sample 1"),
        ({}, {"rollout": {"seed": 1}}, r"s:1: it is not steered"),
        (
            {},
            {"rollout": {"seed": 2, "steer": [FIRST.fields()]}},
            r"s:1: its seed is not that of its baseline .*b:1",
        ),
        ({"tokens": {"prompt": [3]}}, {}, r"s:1: its prompt is not that of its baseline .*b:1"),
        (
            {},
            {"rollout": {"steer": [FIRST.fields(), FIRST.fields()]}},
            r"s:1: 2 features are steered at once",
        ),
        ({}, {"rollout": {"steer": [{"sae": "a"}]}}, r"s:1: field 'rollout.steer' is not as"),
        ({"rollout": {"steer": [FIRST.fields()]}}, {}, r"b:1: it is steered"),
        ({}, {"completion": None}, r"s:1: field 'completion' is missing"),
        ({"reward": 1.5}, {}, r"b:1: field 'reward' is 1.5"),
        ({"reward": None}, {}, r"b:1: field 'reward' is missing.*dlmctl verify"),
        ({"ppl": 0.0}, {}, r"b:1: field 'ppl' is 0"),
    ],
)
def test_what_cannot_be_paired_is_said_with_its_place(
    tmp_path: Path, plain: dict[str, Any], steered: dict[str, Any], message: str
) -> None:
    measured = {"reward": 0.5, "ppl": 3.0}
    first = Record(completion(0, 0, "a", **measured), **plain)
    second = Record(completion(0, 0, "b", FIRST, **measured), **steered)
    files = [written(tmp_path / "b", [first]), written(tmp_path / "s", [second])]
    read = partial(read_sampled_text, score_field="reward", perplexity="ppl")
    with pytest.raises(DataError) as caught:
        list(
            read_twins(read_records(files[1:]), read_baseline(read_records(files[:1]), read), read)
        )
    assert str(caught.value).startswith(str(tmp_path))
    caught.match(message)


def test_samples_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    plain, steered = completion(0, 0, "a"), completion(0, 0, "b", FIRST)
    twice = written(tmp_path / "b", [plain, plain])
    with pytest.raises(DataError, match=r"b:2: it is the same sample as .*b:1"):
        read_baseline(read_records([twice]), read_sampled_text)
    other = completion(0, 0, "b", FIRST._replace(scope="update"))
    file = written(tmp_path / "s", [steered, other])
    with pytest.raises(DataError, match=r"s:1: it is the same sample as .*s:1, steered alike"):
        list(
            read_twins(
                read_records([file, file]),
                read_baseline([plain], read_sampled_text),
                read_sampled_text,
            )
        )


def test_records_that_are_skipped_leave_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steered = [completion(0, 0, "b", FIRST), completion(1, 0, "b", FIRST), Record(error={})]
    baseline = read_baseline([completion(0, 0, "a")], read_sampled_text)
    file = written(tmp_path / "s", steered)
    assert len(list(read_twins(read_records([file]), baseline, read_sampled_text, "skip"))) == 1
    assert "s:2: no baseline" in (said := capsys.readouterr().err)
    assert "left out: 1 records with an error" in said
    assert len(list(read_twins(read_records([file]), baseline, read_sampled_text, "keep"))) == 1
    assert "left out: 2 records" in capsys.readouterr().err


def test_what_the_records_say_is_measured() -> None:
    plain = completion(0, 0, "a", reward=0.2, ppl=10.0)
    steered = completion(0, 0, "b", FIRST, reward=0.9, ppl=5.0)
    read = partial(read_sampled_text, score_field="reward", perplexity="ppl")
    [(treatment, outcome)] = outcomes_of(read_twins([steered], read_baseline([plain], read), read))
    assert treatment == FIRST
    assert outcome.concept == pytest.approx((20, 90))
    assert outcome.perplexity == (10.0, 5.0)
    read = partial(read_sampled_text, score_field="score")
    texts = [read(Record(record, score=35)) for record in (plain, steered)]
    assert [text.concept for text in texts] == [35, 35]
