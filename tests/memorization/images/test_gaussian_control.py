"""The Gaussian control has the moments of the training set, and is told from digits."""

import orjson
import pytest
import torch
from conftest import invoke

from dlmctl.memorization.images.controls import gaussian_control

TRAIN, HELDOUT = "builtin:digits#0:300", "builtin:digits#300:600"


def test_its_moments_are_those_of_the_training_set():
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(30, 2, 1, 2, generator=generator) * torch.tensor([1.0, 3.0]) + 2
    drawn = gaussian_control(train, 200_000, seed=1)
    assert drawn.shape == (200_000, 2, 1, 2)
    rows, known = drawn.flatten(1).double(), train.flatten(1).double()
    assert torch.allclose(rows.mean(0), known.mean(0), atol=0.03)
    assert torch.allclose(rows.T.cov(), known.T.cov(), rtol=0.02, atol=0.05)
    assert torch.equal(gaussian_control(train, 5, seed=1), gaussian_control(train, 5, seed=1))
    assert not torch.equal(gaussian_control(train, 5, seed=1), gaussian_control(train, 5, seed=2))


def test_the_command_studies_it_after_the_samples():
    done = invoke(
        "memo-eval", "--samples", "builtin:digits#600:900", "--train", TRAIN, "--heldout", HELDOUT,
        "--control", "gaussian", "--bootstrap", 50, "--set", "n=300",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    digits, control = map(orjson.loads, done.stdout.splitlines())
    assert "control" not in digits
    assert (control["control"], control["n"], control["samples"]) == ("gaussian", 300, 300)
    # By two moments it is nearer to the training set than other digits are; by where its samples
    # lie it is not.
    assert control["fd"] < digits["fd"]
    assert control["heldout_precision_interval"][1] < digits["heldout_precision_interval"][0]
    assert control["heldout_coverage_interval"][1] < digits["heldout_coverage_interval"][0]
    # The floor is the same for both.
    assert control["fd_train_heldout"] == pytest.approx(digits["fd_train_heldout"])
    low, high = digits["fd_interval"]
    assert low < digits["fd"] < high
    assert high - digits["fd"] == pytest.approx(1.96 * digits["fd_se"], rel=1e-3)


def test_it_is_clear_which_samples_a_file_of_rows_is_of(tmp_path):
    given = ("--samples", HELDOUT, "--train", TRAIN, "--control", "gaussian")
    done = invoke("memo-eval", *given, "--rows", tmp_path / "rows.jsonl")
    assert done.exit_code == 2
    assert "and no --control" in done.stderr
