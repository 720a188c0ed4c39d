"""Comparisons with a baseline against closed forms, all resamples of tiny sets, and scipy."""

import math
import random
from fractions import Fraction
from itertools import product
from statistics import NormalDist

import numpy as np
import orjson
import pytest
from conftest import invoke

from dlmctl.records.errors import DataError
from dlmctl.records.jsonl import Record, dump
from dlmctl.report.comparison import Comparison, comparison_rows, mcnemar
from dlmctl.settings.report import Comparing


def side(*prompts, task="t", **more):
    """Records of prompts p0, p1, …, each a list of rewards."""
    return [
        Record(id=f"p{p}", task=task, prompt=f"q{p}", sample=s, reward=float(r), **more)
        for p, rewards in enumerate(prompts)
        for s, r in enumerate(rewards)
    ]


def compared(baseline, records, by="task"):
    comparison = Comparison(baseline, by)
    list(comparison.collected(records))
    return comparison


def rows(baseline, records, confidence=0.95, ks=(1,), **comparing):
    pairs = compared(baseline, records).pairs
    made = comparison_rows(pairs, ks, confidence, Comparing(**comparing))
    return {row["measure"]: row for row in made if row["task"] == made[-1]["task"]}


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (0, 5), (3, 9), (9, 3), (40, 61)])
def test_mcnemar_is_the_two_sided_binomial(lost, gained):
    n, least = lost + gained, min(lost, gained)
    tail = sum(Fraction(math.comb(n, i), 2**n) for i in range(least + 1))
    assert mcnemar(lost, gained) == pytest.approx(float(min(1, 2 * tail)), rel=1e-12)
    stats = pytest.importorskip("scipy.stats")
    assert mcnemar(lost, gained) == pytest.approx(
        stats.binomtest(lost, n).pvalue if n else 1.0, rel=1e-12
    )


def test_mcnemar_of_many_prompts_is_the_normal_one():
    lost, gained = 50_300, 49_700
    z = (abs(lost - gained) - 1) / math.sqrt(lost + gained)
    assert mcnemar(lost, gained) == pytest.approx(2 * NormalDist().cdf(-z), rel=1e-3)


@pytest.mark.parametrize("flips", [(1,), (1, 1, 1), (1, 1, 1, 1, 1, 1, 0), (1, 0, 0, 1, 1)])
def test_p_of_one_sample_a_prompt_is_mcnemars(flips):
    """1: was right and is wrong, 0: the reverse; and some prompts that did not change."""
    before = [[f] for f in flips] + [[1], [0], [0]]
    after = [[1 - f] for f in flips] + [[1], [0], [0]]
    row = rows(side(*before), side(*after))["accuracy"]
    assert (row["lost"], row["gained"]) == (sum(flips), len(flips) - sum(flips))
    assert row["p"] == pytest.approx(row["mcnemar"], abs=1e-12)
    # And with so many prompts that exchanges are drawn.
    before, after = before + [[1]] * 40, after + [[1]] * 40
    drawn = rows(side(*before), side(*after))["accuracy"]
    assert drawn["p"] == pytest.approx(row["mcnemar"], abs=0.02)


UNEVEN = ([[1, 0], [1], [1, 1, 0], [0, 1]], [[0, 0], [1], [0, 1, 0], [0, 1]])


def test_p_counts_all_exchanges_of_prompts_with_unequal_samples():
    before, after = UNEVEN
    observed = abs(share(after) - share(before))
    hits = 0
    for signs in product([False, True], repeat=len(before)):
        a = [y if s else x for x, y, s in zip(before, after, signs, strict=True)]
        b = [x if s else y for x, y, s in zip(before, after, signs, strict=True)]
        hits += abs(share(b) - share(a)) >= observed - 1e-12
    row = rows(side(*before), side(*after))["accuracy"]
    assert row["p"] == hits / 2 ** len(before)
    assert row["difference"] == pytest.approx(share(after) - share(before))


def share(prompts):
    return sum(map(sum, prompts)) / sum(map(len, prompts))


@pytest.mark.parametrize("confidence", [0.6, 0.9])
def test_the_interval_is_that_of_all_resamples_of_prompts(confidence):
    before, after = ([*part, [1, 0], [0]] for part in UNEVEN)
    after[4], after[5] = [1, 1], [1]
    every = []
    for places in product(range(len(before)), repeat=len(before)):
        every.append(share([after[p] for p in places]) - share([before[p] for p in places]))
    low, high = rows(side(*before), side(*after), confidence, bootstrap=100_000)["accuracy"][
        "interval"
    ]
    # The distribution has steps: the end is where the share of resamples passes the tail.
    tail, every = (1 - confidence) / 2, np.array(every)
    for end, least in ((low, tail), (high, 1 - tail)):
        below, upto = (every < end - 1e-9).mean(), (every <= end + 1e-9).mean()
        assert below - 0.005 <= least <= upto + 0.005


def test_samples_of_a_prompt_stay_together():
    """Eight copies of a sample say no more than one does."""
    random.seed(3)
    before = [[random.randint(0, 1)] for _ in range(60)]
    after = [[random.randint(0, 1)] for _ in range(60)]
    single = rows(side(*before), side(*after))["accuracy"]
    copies = rows(side(*(x * 8 for x in before)), side(*(x * 8 for x in after)))["accuracy"]
    for name in ("difference", "interval", "p", "mcnemar"):
        assert copies[name] == pytest.approx(single[name], abs=1e-12)


def test_the_interval_is_that_of_scipy_and_about_the_normal_one():
    generator = np.random.default_rng(0)
    before, after = generator.normal(size=400), generator.normal(0.2, size=400)
    row = rows(side(*before[:, None]), side(*after[:, None]))["reward"]
    half = 1.96 * (after - before).std() / math.sqrt(400)
    centre = (after - before).mean()
    assert row["interval"] == pytest.approx([centre - half, centre + half], abs=0.1 * half)
    stats = pytest.importorskip("scipy.stats")
    done = stats.bootstrap(
        (before, after),
        lambda a, b, axis=-1: b.mean(axis) - a.mean(axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert row["interval"] == pytest.approx([done.low, done.high], abs=0.05 * half)


def test_equal_models_are_seldom_significantly_worse():
    generator, worse = np.random.default_rng(5), 0
    for _ in range(200):
        ease = generator.random(25)
        before, after = ((generator.random((25, 4)) < ease[:, None]).astype(int) for _ in "ab")
        row = rows(side(*before), side(*after), 0.9, bootstrap=400)["accuracy"]
        worse += row["change"] == "worse"
    assert worse / 200 < 0.1  # expected 0.05, standard error 0.015


def test_one_prompt_is_never_enough():
    row = rows(side([1]), side([0]))["accuracy"]
    assert (row["difference"], row["p"], row["change"]) == (-1, 1, "unclear")


def test_worse_is_less_but_more_of_what_costs():
    fast, slow = {"rollout": {"nfe": 8}}, {"rollout": {"nfe": 16}}
    ones, zeros = [[1]] * 20, [[0]] * 20
    changes = {
        name: row["change"] for name, row in rows(side(*ones, **fast), side(*zeros, **slow)).items()
    }
    assert changes == {"accuracy": "worse", "pass@1": "worse", "reward": "worse", "nfe": "worse"}
    back = rows(side(*zeros, **slow), side(*ones, **fast))
    assert {row["change"] for row in back.values()} == {"better"}


def test_a_measure_is_compared_on_prompts_that_have_it_on_both_sides():
    before, after = side([1], [1], [0]), side([0], [1], [1])
    before[0]["rollout"], before[1]["rollout"], after[1]["rollout"] = (
        {"nfe": n} for n in (100, 10, 30)
    )
    row = rows(before, after)["nfe"]
    assert (row["prompts"], row["baseline"], row["value"]) == (1, 10, 30)


def test_several_samples_are_right_if_more_than_half_are():
    row = rows(side([1, 1, 0], [1, 0], [0, 0]), side([1, 0, 0], [0, 0], [1, 1]))["accuracy"]
    assert (row["lost"], row["gained"]) == (1, 1)


def test_what_has_no_counterpart_is_counted_and_named(capsys):
    before, after = side([1, 0], [1], [0]), side([1], [0], [1], [1])
    del before[3], after[1]  # p2 and p1
    after[-1]["error"] = {"message": "x"}  # p3
    after.append(Record(id="p4", task="t", reward=0.0))
    after[0]["prompt"] = "another"
    comparison = compared(before, after)
    made = comparison.rows([1], 0.95, Comparing())
    said = capsys.readouterr().err
    assert "1 prompt is only in the baseline, and left out: p1\n" in said
    assert "2 prompts are not in the baseline, and left out: p2, p4\n" in said
    assert "1 sample of prompts of both has no counterpart" in said
    assert "1 prompt is asked in other words in the baseline: p0\n" in said
    assert made[0]["unpaired"] == {"baseline": 1, "records": 2, "samples": 1}
    assert made[0]["prompts"] == 1


def test_prompts_pair_by_task_and_id_and_the_order_of_lines_does_not_matter():
    before = side([1], [0], [1], task="a") + side([0], [0], [1], task="b")
    after = side([0], [0], [1], task="a") + side([1], [1], [1], task="b")
    made = compared(before, after).rows([1], 0.95, Comparing())
    shown = [(row["task"], row["lost"], row["gained"]) for row in made if "lost" in row]
    assert shown == [("a", 1, 0), ("b", 0, 2), ("all", 1, 2)]
    again = compared(before[::-1], after[::-1]).rows([1], 0.95, Comparing())
    assert sorted(map(dump, again)) == sorted(map(dump, made))


def test_records_without_a_number_of_the_sample_pair_by_place():
    before = [Record(id=1, reward=r) for r in (1.0, 0.0)]
    after = [Record(id=1, sample=s, reward=r) for s, r in ((1, 0.0), (0, 1.0))]
    [pair] = compared(before, after).pairs.pairs
    assert [one.correct for one in pair.baseline] == [one.correct for one in pair.compared]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([Record(reward=1.0)], "'id' is missing.*pairs prompts by it"),
        ([*side([1]), *side([0])], "sample 0 of prompt p0 was there before"),
        ([Record(id="p0", task="t", sample="x")], "'sample' is str"),
    ],
)
def test_what_cannot_be_paired_is_refused(records, message):
    with pytest.raises(DataError, match=message):
        compared(side([1]), records)


@pytest.fixture
def files(tmp_path):
    def write(name, *prompts):
        path = tmp_path / name
        path.write_bytes(b"".join(map(dump, side(*prompts))))
        return path

    return {
        "good": write("good", *[[1]] * 12, [0]),
        "same": write("same", *[[1]] * 11, [0], [1]),
        "bad": write("bad", *[[0]] * 12, [0]),
        "others": write("others"),
    }


@pytest.mark.parametrize(
    ("records", "options", "code"),
    [
        ("bad", ["--compare", "good", "--fail-worse", "accuracy"], 1),
        ("bad", ["--compare", "good", "--fail-worse", "pass@1", "--confidence", "0.9999"], 0),
        ("bad", ["--compare", "good"], 0),
        (
            "same",
            ["--compare", "good", "--fail-worse", "accuracy", "--fail-under", "reward=0.9"],
            0,
        ),
        ("same", ["--compare", "good", "--fail-worse", "accuracy", "--fail-under", "reward=1"], 1),
        ("good", ["--compare", "bad", "--fail-worse", "accuracy"], 0),
        ("good", ["--compare", "bad", "--fail-worse", "beauty"], 2),
        ("good", ["--fail-worse", "accuracy"], 2),
        ("-", ["--compare", "-"], 2),
        ("good", ["--compare", "bad", "--within", "x"], 2),
        ("good", ["--compare", "others"], 65),
        ("others", ["--compare", "good"], 65),
        ("good", ["--compare", "missing"], 66),
    ],
)
def test_the_exit_code_says_what_is_significantly_worse(files, tmp_path, records, options, code):
    places = [files.get(option, option) for option in options]
    result = invoke("stats", files.get(records, records), *places)
    assert result.exit_code == code, result.output


def test_one_seed_gives_the_same_bytes_and_another_other_ones(files):
    def made(*options):
        return invoke("stats", files["same"], "--compare", files["good"], *options).stdout

    assert made() == made("--seed", "0") == made()
    row = orjson.loads(made().splitlines()[0])
    assert (row["measure"], row["lost"], row["gained"]) == ("accuracy", 1, 1)
    before, after = np.random.default_rng(0).normal(size=(2, 30, 1))
    intervals = [rows(side(*before), side(*after), seed=n)["reward"]["interval"] for n in (0, 0, 1)]
    assert intervals[0] == intervals[1] != intervals[2]
