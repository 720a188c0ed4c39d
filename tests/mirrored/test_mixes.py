"""The mirrored device refuses operations on tensors of two devices, and names their lines."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dlmctl.rl.gradient import elbo_coefficients

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def report(guard):
    run = [sys.executable, HERE / "mixes.py"]
    environment = os.environ | {"DLMCTL_TEST_GUARD": str(guard)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_mixes_are_refused_and_noted_even_if_the_error_is_caught(report):
    assert len(report["refused"]) == 16
    for name, said in report["refused"].items():
        assert said, name
        assert report["noted"][name] == [said], name


def test_the_line_of_a_mix_is_named(report):
    lines, first = inspect.getsourcelines(elbo_coefficients)
    [product] = [n for n, line in enumerate(lines, first) if "coefficients[:, None] *" in line]
    said = report["refused"]["weights of masks"]
    assert said.startswith(f"dlmctl/rl/gradient.py:{product}: aten.mul.Tensor has tensors")


def test_what_cuda_computes_is_computed(report):
    assert len(report["allowed"]) == 5
    assert all(report["allowed"].values()), report["allowed"]
