"""Group-relative advantages by hand."""

import math
from statistics import mean, stdev

import pytest

from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.jsonl import Record
from dlmctl.rl.advantage_stage import SETTINGS, advantage, consistent
from dlmctl.rl.advantages import EPSILON, Normalization, advantages
from dlmctl.rl.batches import step_batches

GROUPS = [[1.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.5, 0.25, 1.0], [2.0, -1.0]]


def test_the_group_mean_is_taken_away():
    made = advantages([[1, 0, 0, 1], [2, 0]], Normalization())
    assert made == [[0.5, -0.5, -0.5, 0.5], [1, -1]]


def test_leave_one_out_compares_with_the_others():
    [made] = advantages([[1.0, 0.0, 0.5]], Normalization("loo"))
    assert made == pytest.approx([1 - 0.25, 0 - 0.75, 0.5 - 0.5])


def test_no_baseline_leaves_the_reward():
    assert advantages([[1, 0], [1, 1]], Normalization("none")) == [[1, 0], [1, 1]]


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_nothing_is_scaled_without_a_baseline(scale):
    # Equal rewards would become 1e4 times as large.
    with pytest.raises(UsageError, match=f"--scale {scale} divides the distance from a baseline"):
        Normalization("none", scale)


@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_deviations_are_those_of_the_rewards_and_unbiased(baseline):
    """As TRL, ESPO and GDSD write it, with the standard library."""

    def centred(group):
        if baseline == "mean":
            return [reward - mean(group) for reward in group]
        others = [mean([*group[:n], *group[n + 1 :]]) for n in range(len(group))]
        return [reward - other for reward, other in zip(group, others, strict=True)]

    whole = stdev([reward for group in GROUPS for reward in group])
    for scale, deviation in (("group", stdev), ("batch", lambda _: whole)):
        made = advantages(GROUPS, Normalization(baseline, scale))
        for ours, group in zip(made, GROUPS, strict=True):
            expected = [value / (deviation(group) + EPSILON) for value in centred(group)]
            assert ours == pytest.approx(expected, rel=1e-12)
    [six, *_] = advantages(GROUPS, Normalization("loo", "group"))
    assert six[0] == pytest.approx(0.8 / (math.sqrt(4 / 15) + 1e-4))


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equal_rewards_and_groups_of_one_have_exactly_no_advantage(baseline, scale):
    made = advantages([[0.1, 0.1, 0.1], [0.7]], Normalization(baseline, scale))
    assert made == [[0, 0, 0], [0]]
    assert advantages([[0.7]], Normalization(baseline, scale)) == [[0]]


def test_the_stage_holds_one_group_at_a_time():
    seen = []

    def stream():
        for n in range(6):
            seen.append(n)
            yield Record(id=n // 2, reward=float(n % 2))

    out = advantage(stream(), Normalization())
    assert next(out)["advantage"] == -0.5
    assert len(seen) == 3
    assert [r["advantage"] for r in out] == [0.5, -0.5, 0.5, -0.5, 0.5]


def test_records_without_reward_are_named():
    record = Record(id="a")
    record.where = "x.jsonl:7"
    with pytest.raises(DataError, match=r"x\.jsonl:7.*'reward' is missing.*verify"):
        list(advantage([record], Normalization()))


def rewarded(sizes, samples=2, failed=(), **place):
    """Groups of these sizes, rewards all different; some records failed."""
    rows = []
    for group, size in enumerate(sizes):
        for n in range(size):
            row = Record(id=group, sample=n, reward=float(len(rows) ** 2))
            row["rollout"] = {"samples": samples, **place}
            row.where = f"in.jsonl:{len(rows) + 1}"
            if len(rows) in failed:
                row["error"] = {"message": "no"}
            rows.append(row)
    return rows


def test_records_with_an_error_keep_their_places():
    stray = Record(line="{", error={})
    rows = rewarded([2, 2, 2], failed=(1, 4, 5))
    rows.insert(3, stray)
    for scale in ("none", "group", "batch"):
        made = list(advantage([Record(row) for row in rows], Normalization("mean", scale)))
        assert [r.get("id", "stray") for r in made] == [0, 0, 1, "stray", 1, 2, 2]
        assert [("advantage" in r) for r in made] == [True, False, True, False, True, False, False]


def test_in_a_training_loop_nothing_waits_for_the_next_round():
    rows = rewarded([2, 2], failed=(1, 3), round=0, round_size=4)
    for scale in ("none", "batch"):
        read = 0

        def watched():
            nonlocal read
            for row in rows:
                read += 1
                yield row
            raise AssertionError("the next record comes after this round was trained on")

        out = advantage(watched(), Normalization("mean", scale))
        assert len([next(out) for _ in rows]) == read == 4


def test_the_batches_of_a_scale_are_the_steps_of_update():
    rows = rewarded([2, 1, 2, 2, 2], failed=(4,))
    normalization = Normalization("mean", "batch", 2)
    made = [r for r in advantage([Record(r) for r in rows], normalization) if "error" not in r]
    expected = []
    for batch in step_batches(rows, 2):
        rewards = [[row["reward"] for row in group] for group in batch.groups]
        expected += [value for group in advantages(rewards, normalization) for value in group]
    assert [r["advantage"] for r in made] == expected
    assert made[0][SETTINGS] == {"baseline": "mean", "scale": "batch", "prompts_per_step": 2}


def test_a_round_that_was_cut_is_no_error_here():
    rows = rewarded([2, 2, 1], round=0, round_size=8)
    made = list(advantage(rows, Normalization("mean", "batch", 8)))
    assert all("advantage" in row for row in made)


def test_an_advantage_says_how_it_was_made():
    [record] = advantage([Record(id=1, reward=1.0)], Normalization.of("grpo"))
    assert record["advantage_settings"] == {"baseline": "mean", "scale": "group"}


def test_advantages_that_were_made_otherwise_are_refused():
    made = list(advantage(rewarded([2, 2]), Normalization.of("rspo")))
    assert list(consistent(made, Normalization.of("wd1"))) == made
    stream = consistent(made, Normalization.of("espo"))
    with pytest.raises(DataError) as caught:
        next(stream)
    said = str(caught.value)
    assert said.startswith("in.jsonl:1: its advantage was made with --baseline mean --scale none")
    assert said.endswith("'dlmctl advantage --baseline loo --scale none'")
    # Not the first record alone.
    mixed = [*made[:2], *advantage(rewarded([1]), Normalization.of("grpo"))]
    mixed[2].where = "in.jsonl:3"
    stream = consistent(mixed, Normalization.of("rspo"))
    assert [next(stream), next(stream)] == made[:2]
    with pytest.raises(DataError, match=r"^in\.jsonl:3: .*--scale group"):
        next(stream)


def test_the_steps_that_a_scale_goes_by_are_compared_too():
    made = list(advantage(rewarded([2, 2]), Normalization("mean", "batch", 1)))
    assert list(consistent(made, Normalization("mean", "batch", 1))) == made
    with pytest.raises(DataError, match=r"--prompts-per-step 1, .*--prompts-per-step 2"):
        list(consistent(made, Normalization("mean", "batch", 2)))


def test_records_with_and_without_an_advantage_do_not_mix():
    rows = rewarded([2, 2])
    half = [*advantage(rows[:2], Normalization()), *rows[2:]]
    with pytest.raises(DataError, match=r"in\.jsonl:3: .* no 'advantage', and in\.jsonl:1 has one"):
        list(consistent(half, Normalization()))
    with pytest.raises(DataError, match=r"in\.jsonl:2: .* an 'advantage', and in\.jsonl:3 has non"):
        list(consistent(half[::-1][1:], Normalization()))
    assert len(list(consistent(rewarded([2, 2]), Normalization()))) == 4


def test_an_advantage_of_another_tool_is_taken_and_that_is_said_once(capsys):
    rows = rewarded([2, 2])
    for row in rows:
        row["advantage"] = 1.0
    assert list(consistent(rows, Normalization.of("grpo"))) == rows
    assert capsys.readouterr().err.count("in.jsonl:1: the advantage does not say how") == 1
