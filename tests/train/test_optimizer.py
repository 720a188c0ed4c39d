"""The optimizer's settings and schedule."""

import math

import pytest
import torch
from torch import nn

from dlmctl.settings.optimizer import Optimizer
from dlmctl.train.optimizer import apply_step, learning_rate, make_optimizer


def test_the_rate_warms_up_and_then_stays():
    rates = [learning_rate(s, 1.0, warmup=4) for s in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_cosine_falls_to_zero_at_its_end():
    rates = [learning_rate(s, 2.0, 0, "cosine", 4) for s in range(6)]
    expected = [1 + math.cos(math.pi * min(s, 4) / 4) for s in range(6)]
    assert rates == pytest.approx(expected)


def test_matrices_decay_and_vectors_do_not():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([matrix, vector], Optimizer(weight_decay=0.5))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    apply_step(optimizer, [matrix, vector], rate=0.1, max_norm=0)
    assert matrix.flatten().tolist() == pytest.approx([0.95] * 4)
    assert vector.tolist() == [1, 1]


def test_gradients_are_clipped_to_their_norm_and_cleared():
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.tensor([3.0, 4.0])
    norm, applied = apply_step(optimizer, [parameter], rate=1.0, max_norm=1.0)
    assert (norm, applied) == (5.0, True)
    assert parameter.tolist() == pytest.approx([-0.6, -0.8], abs=1e-4)
    assert parameter.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([parameter], Optimizer(weight_decay=0.0))
    parameter.grad = torch.tensor([1.0, bad])
    _, applied = apply_step(optimizer, [parameter], rate=1.0, max_norm=1.0)
    assert not applied
    assert parameter.tolist() == [1, 1]
    assert not optimizer.state
