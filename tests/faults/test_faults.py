"""A share of the faults; `python tests/faults/run.py` does as many as one likes."""

import os
import random

import pytest
from harness import KINDS, Harness, plan
from jobs import JOBS
from preloaded import HANGS

FAULTS = int(os.environ.get("DLMCTL_TEST_FAULTS", "10"))
CHEAP = ["rollout", "verify", "score-elbo", "advantage", "update-sft", "sae-train",
         "distill-teacher", "memo-text", "prompts", "init"]  # fmt: skip


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("faults"), soon=HANGS)  # a disk may be slow, too


@pytest.mark.parametrize(
    ("number", "job", "kind"),
    [
        pytest.param(number, job, kind, id=f"{number}-{job.name}-{kind}")
        for number, job, kind in plan(FAULTS, CHEAP, list(KINDS))
    ],
)
def test_after_a_fault_the_same_command_goes_on(harness, number, job, kind):
    harness.fault(number, 0, job, kind)


def test_every_job_meets_every_kind_that_suits_it():
    planned = plan(1000, list(JOBS), list(KINDS))
    met = {(job.name, kind) for _, job, kind in planned}
    assert met == {(job.name, kind) for job in JOBS.values() for kind in KINDS
                   if KINDS[kind].suits(job)}  # fmt: skip
    first = [kind for _, _, kind in planned[:60]]
    assert set(first) == set(KINDS)


def test_a_fault_is_had_again_by_its_number():
    assert random.Random("0/7").random() == random.Random("0/7").random()
    assert plan(50, list(JOBS), list(KINDS))[:20] == plan(20, list(JOBS), list(KINDS))
