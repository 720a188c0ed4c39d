"""What the host waits for, and that every operation has its tensors on one device.

On a CUDA device that is not there (mirror.py). A host that waits in every step leaves the device
without work, and no graph of kernels can be recorded over it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def reports(guard):
    run = [sys.executable, HERE / "steps.py", "builtin:puzzles"]
    done = subprocess.run(
        run, env=os.environ | {"DLMCTL_TEST_GUARD": str(guard)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {report["of"]: report for report in map(json.loads, done.stdout.splitlines())}


def test_the_mirrored_device_computes_what_the_cpu_does(reports):
    assert len(reports) == 20
    assert all(report["equal"] for report in reports.values())


def test_the_host_waits_once_in_a_denoising_step(reports):
    for name, report in reports.items():
        if name.startswith("sampling"):
            [(line, waits)] = report["waits"].items()
            assert line.startswith("fetch dlmctl/diffusion/sampler.py"), name
            assert waits == report["steps"], name


def test_the_host_waits_twice_in_a_step_from_left_to_right(reports):
    """Once in transformers, which asks whether its mask is needed."""
    report = reports["left to right"]
    waits = sum(n for line, n in report["waits"].items() if not line.startswith("push"))
    assert report["steps"] > 5
    assert waits <= 2 * report["steps"] + 4  # the results of a batch, too


def test_the_host_waits_once_for_the_value_of_a_gradient_and_not_for_its_micro_batches(reports):
    assert list(reports["gradient"]["waits"].values()) == [1]


def test_the_host_waits_twice_in_a_step_of_an_autoencoder(reports):
    """For the dead latents, whose number is a shape, and for the norm of the gradient."""
    for name in ("autoencoder", "autoencoder, buffer on the host"):
        assert sum(reports[name]["waits"].values()) == 2 * reports[name]["steps"], name


def test_kernels_of_a_step_keep_within_their_budget(reports):
    """Four layers, of which a pass takes about 50 each; budgets are a tenth above what it takes."""
    per_step = {name: report["kernels"] / report["steps"] for name, report in reports.items()}
    assert per_step["sampling, temperature 0"] < 325
    assert per_step["sampling, temperature 1"] < 360
    assert per_step["sampling, dual"] < 340
    assert per_step["gradient"] < 660
