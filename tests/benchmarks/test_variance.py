"""elbo.py measures what it says it measures."""

from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, shell, tiny_policy
from elbo import elbo_variance

from dlmctl.diffusion.elbo import elbo_samples
from dlmctl.diffusion.scoring import MaskPlan, example_of
from dlmctl.records.jsonl import Record


def completions(prompts=2, samples=4):
    return [
        Record(
            id=f"p{p}",
            sample=i,
            tokens={"prompt": [3, 4 + p], "completion": [3 + (p + i * j) % 5 for j in range(6)]},
            rollout={"samples": samples},
        )
        for p in range(prompts)
        for i in range(samples)
    ]


@pytest.fixture(scope="module")
def rows():
    measured = elbo_variance(tiny_policy(), completions(), [2, 3], 200, 0, 512)
    return {(row["masks"], row["passes"]): row for row in measured}


def test_laws_in_pairs_are_left_out_at_odd_numbers_of_passes(rows):
    laws = {"independent", "uniform", "complementary", "stratified", "quadrature"}
    assert {law for law, passes in rows if passes == 2} == laws
    assert {law for law, passes in rows if passes == 3} == laws - {"complementary", "stratified"}


def test_the_default_has_at_most_half_the_variance_of_independent_t(rows):
    assert rows["independent", 2]["ratio"] == 1
    assert rows[MaskPlan().law, 2]["ratio"] < 0.5


def test_unbiased_laws_have_no_bias(rows):
    for law in ("independent", "uniform", "complementary", "stratified"):
        assert abs(rows[law, 2]["bias"]) < 4 * rows[law, 2]["bias_stderr"]


def test_spreading_levels_over_a_group_helps_its_mean_and_independent_masks_do_not(rows):
    for law in ("stratified", "complementary"):
        assert rows[law, 2]["group_variance"] < 0.8 * rows[law, 2]["variance"]
    for law in ("independent", "uniform"):
        assert rows[law, 2]["group_variance"] == pytest.approx(rows[law, 2]["variance"], rel=0.35)


def test_the_variance_is_that_of_the_estimates():
    policy, records = tiny_policy(), completions(1, 2)
    row = next(r for r in elbo_variance(policy, records, [1], 3, 5, 8) if r["masks"] == "uniform")
    estimates = torch.stack(
        [
            elbo_samples(
                policy,
                [example_of(r, policy, MaskPlan("uniform", 1, 5, draw=d)) for r in records],
                8,
            )[:, 0]
            for d in range(3)
        ]
    )
    assert row["variance"] == pytest.approx(float(estimates.var(dim=0).mean()))
    assert row["group_variance"] == pytest.approx(2 * float(estimates.mean(dim=1).var()))


def test_the_command_line(tmp_path):
    script = f"python {Path(__file__).with_name('elbo.py')}"
    line = f"dlmctl rollout -q -n 2 --prompts 2 | {script} -k 2 --repeats 3 > rows.jsonl"
    assert shell(line, tmp_path).returncode == 0
    rows = read_jsonl(tmp_path / "rows.jsonl")
    assert len(rows) == 5
    assert {row["completions"] for row in rows} == {4}
    wrong = shell(f"{script} -k two", tmp_path)
    assert (wrong.returncode, "-k two is not a list" in wrong.stderr) == (2, True)
