"""The tests that need a GPU pass on a mirrored one: if they fail on a real one, that is why."""

import os
import subprocess
import sys
from pathlib import Path


def test_the_tests_of_a_gpu_pass_on_a_mirrored_one(guard):
    run = [sys.executable, Path(__file__).with_name("gpu_tests.py")]
    environment = os.environ | {"DLMCTL_TEST_GUARD": str(guard)}
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [marks] = [line for line in done.stdout.splitlines() if line.endswith("[100%]")]
    assert set(marks.partition(" ")[0]) == {"."}, "some were skipped"
