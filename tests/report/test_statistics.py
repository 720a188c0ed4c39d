"""Statistics against closed forms and counting."""

import math
from itertools import combinations
from statistics import correlation

import pytest
from typer.testing import CliRunner

from dlmctl.cli import app
from dlmctl.records.jsonl import Record, dump
from dlmctl.report.statistics import is_correct, pass_at_k, tally, wilson_interval


def samples(prompt, rewards, **more):
    return [Record(id=prompt, task="t", sample=i, reward=r, **more) for i, r in enumerate(rewards)]


def test_pass_at_k_counts_the_subsets_that_hold_a_right_sample():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations(range(n), k))
                hits = sum(any(i < c for i in subset) for subset in subsets)
                assert pass_at_k(n, c, k) == pytest.approx(hits / len(subsets))


def test_the_wilson_interval_has_its_published_values():
    low, high = wilson_interval(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(0.0, 20)[0] == pytest.approx(0, abs=1e-12)
    assert wilson_interval(0.0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    assert wilson_interval(0.3, 0) == (0, 1)


def test_samples_that_are_all_alike_count_as_one_per_prompt():
    alike = [r for p in range(20) for r in samples(p, [p % 2] * 8)]
    single = [r for p in range(20) for r in samples(p, [p % 2])]
    [wide] = tally(alike, "task", [1], 0.95)
    [expected] = tally(single, "task", [1], 0.95)
    # m / (m - 1) of the cluster-robust variance is the only difference.
    assert wide["interval"] == pytest.approx(expected["interval"], abs=0.01)
    assert wide["accuracy"] == expected["accuracy"] == 0.5


def test_independent_samples_keep_their_number():
    pattern = [[1, 0, 0, 1], [0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]] * 10
    [row] = tally([r for p, g in enumerate(pattern) for r in samples(p, g)], "task", [1], 0.95)
    # Every prompt has exactly half right: less spread than chance; never more than n.
    assert row["interval"][0] > wilson_interval(0.5, 40)[0]


def test_rows_are_by_task_and_in_all():
    records = [*samples("a", [1, 0]), Record(id="b", task="u", reward=2.0)]
    rows = tally(records, "task", [1, 2], 0.95)
    assert [r["task"] for r in rows] == ["t", "u", "all"]
    assert rows[0]["pass@1"] == 0.5
    assert rows[0]["pass@2"] == 1.0
    assert "pass@2" not in rows[1]
    assert rows[2]["completions"] == 3
    assert rows[2]["reward"] == pytest.approx(1.0)


def test_each_sample_of_a_prompt_counts_in_the_row_of_its_own_value():
    records = samples("a", [1.0, 0.0, 1.0])
    for record, finish in zip(records, ("eos", "length", "length"), strict=True):
        record["rollout"] = {"finish": finish}
    rows = {row["task"]: row for row in tally(records, "finish", [1], 0.95)}
    assert {name: row["completions"] for name, row in rows.items()} == {
        "eos": 1,
        "length": 2,
        "all": 3,
    }
    assert rows["eos"]["accuracy"] == 1.0
    assert rows["length"]["accuracy"] == 0.5


def test_right_is_what_the_verifiers_say_and_not_a_dense_reward():
    assert is_correct(Record(reward=0.5, verdict={"sudoku": {"correct": True}}))
    assert not is_correct(
        Record(reward=2.0, verdict={"a": {"correct": True}, "b": {"correct": False}})
    )
    assert is_correct(Record(reward=1.0, verdict={"tags": {}}))
    assert not is_correct(Record(reward=0.99))


def test_averages_come_from_what_rollout_and_verify_wrote():
    place = {"nfe": 8, "finish": "eos", "length": 3, "model": "m"}
    verdict = {"sudoku": {"correct": False, "stored": 2, "empty": 8}}
    records = samples("a", [0.0], rollout=place, verdict=verdict, tokens={"completion": [1] * 9})
    records += samples("b", [0.0], rollout={**place, "nfe": 4, "length": 5, "finish": "length"})
    [row] = tally(records, "model", [1], 0.95)
    assert (row["task"], row["nfe"], row["tokens"], row["finished"]) == ("m", 6, 4, 0.5)
    assert row["cells"] == 0.25


def test_a_stored_solution_is_one_verdict_and_the_rules_another():
    other = {"sudoku": {"correct": True, "stored": 6, "empty": 8}}
    same = {"sudoku": {"correct": True, "stored": 8, "empty": 8}}
    clues_overwritten = {"sudoku": {"correct": False, "stored": 8, "empty": 8}}
    records = [
        Record(id=name, reward=0.0, verdict=verdict)
        for name, verdict in (("a", other), ("b", same), ("c", clues_overwritten))
    ]
    [row] = tally(records, "task", [1], 0.95)
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert row["stored"] == pytest.approx(1 / 3)


def test_records_with_an_error_are_left_out_and_counted():
    [row] = tally([*samples("a", [1.0]), Record(id="b", error={})], "task", [1], 0.95)
    assert row["errors"] == 1
    assert row["completions"] == 1


def test_records_without_an_id_are_prompts_of_their_own():
    [row] = tally([Record(reward=1.0), Record(reward=0.0)], "task", [1], 0.95)
    assert (row["prompts"], row["accuracy"]) == (2, 0.5)


def test_nothing_at_all_gives_an_empty_row():
    [row] = tally([], "task", [1], 0.95)
    assert row["completions"] == 0
    assert row["accuracy"] is None


@pytest.fixture
def verified(tmp_path):
    path = tmp_path / "v.jsonl"
    records = [r for p in range(10) for r in samples(p, [1, p % 2])]
    path.write_bytes(b"".join(map(dump, records)))
    return str(path)


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        (["accuracy=0.7"], 0),
        (["accuracy=0.8"], 1),
        (["accuracy=0.7", "pass@2=1.0"], 0),
        (["accuracy=0.7", "reward=0.9"], 1),
        (["beauty=0.7"], 2),
        (["accuracy"], 2),
    ],
)
def test_the_exit_code_follows_the_limits(verified, limits, code):
    options = [x for limit in limits for x in ("--fail-under", limit)]
    result = CliRunner().invoke(app, ["stats", "-k", "1", "-k", "2", *options, verified])
    assert result.exit_code == code


def test_a_pipe_gets_json_and_intervals_have_two_ends(verified):
    import orjson

    result = CliRunner().invoke(app, ["stats", verified])
    [row] = [orjson.loads(line) for line in result.stdout.splitlines()]
    low, high = row["interval"]
    assert low < row["accuracy"] == 0.75 < high
    assert math.isclose(row["pass@1"], 0.75)


def test_within_is_the_correlation_of_differences_from_the_mean_of_the_prompt():
    rewards = {"a": ([1, 1, 0, 0], [0.9, 0.5, 0.4, 0.6]), "b": ([1, 0, 0, 0], [0.2, 0.1, 0.0, 0.1])}
    records = [
        Record(id=prompt, reward=reward, rewards={"vqa": reward, "grounding": x})
        for prompt, (right, said) in rewards.items()
        for reward, x in zip(right, said, strict=True)
    ]
    [row] = tally(records, "task", [1], 0.95, ["grounding", "layout"])
    right = [x - sum(r) / 4 for r, _ in rewards.values() for x in r]
    said = [x - sum(g) / 4 for _, g in rewards.values() for x in g]
    assert row["within.grounding"] == pytest.approx(correlation(right, said), abs=1e-12)
    assert 0.3 < row["within.grounding"] < 0.9
    assert row["within.layout"] is None  # which judged none of them
    # A difference between prompts is none within them.
    apart = [
        Record(id=p, reward=r, rewards={"vqa": r, "grounding": r})
        for p in "ab"
        for r in (p == "a",) * 3
    ]
    assert tally(apart, "task", [1], 0.95, ["grounding"])[0]["within.grounding"] is None
