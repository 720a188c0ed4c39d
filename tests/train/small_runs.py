"""Runs of a few steps on made-up completions."""

import torch

from dlmctl.diffusion.scoring import MaskPlan
from dlmctl.models.loading import load_policy
from dlmctl.records.jsonl import Record
from dlmctl.rl.objectives.table import make_objective
from dlmctl.rl.policy_gradient import Batching
from dlmctl.rl.update import update_policy
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.run import open_run

OBJECTIVE = make_objective("rspo", strength=0.05)
BATCHING = Batching(MaskPlan(samples=2))


def verified(steps, first=0):
    """Two groups of two samples for each step."""
    for number in range(4 * first, 4 * (first + steps)):
        yield Record(
            id=f"p{number // 2}",
            sample=number % 2,
            reward=float(number % 2),
            tokens={
                "prompt": [3 + number % 7, 8],
                "completion": [3 + (number * k) % 11 for k in range(5)],
            },
            rollout={"samples": 2},
        )


def train(directory, model, records, rank=0, rate=1e-2, **settings):
    run = open_run(
        directory,
        model,
        "rspo",
        Optimizer(rate, max_norm=1.0, **settings),
        Adapter(rank),
        "cpu",
        "auto",
        False,
        seed=0,
    )
    return list(update_policy(records, run, OBJECTIVE, BATCHING, 2, 8, save_every=100, keep=2)), run


def weights(directory):
    return load_policy(str(directory), "cpu").model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
