"""The written-out gradient against automatic differentiation of the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.gradient import Dictionary, add_gradient

D, F, N, K = 6, 20, 9, 3


def _dictionary(seed: int = 0) -> Dictionary:
    sae = Dictionary(D, F, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.decoder.copy_(functional.normalize(sae.decoder, dim=1))
    return sae


def _activations(seed: int = 1) -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _dense_loss(
    sae: Dictionary, x: Tensor, dead: Tensor, k_aux: int, weight: float, rectified: bool
) -> Tensor:
    """L as it is defined, with dense codes."""
    pre = (x - sae.centre) @ sae.encoder.T + sae.bias
    kept = torch.zeros_like(pre).scatter(1, pre.topk(K, dim=1).indices, 1.0)
    made = (pre.relu() * kept) @ sae.decoder + sae.centre
    loss = (made - x).square().sum(dim=1).mean()
    if len(dead):
        error = (x - made).detach()
        alive = torch.ones(F, dtype=torch.bool).index_fill(0, dead, False)
        places = pre.masked_fill(alive, -torch.inf).topk(k_aux, dim=1).indices
        chosen = torch.zeros_like(pre).scatter(1, places, 1.0)
        values = pre.relu() if rectified else pre
        missed = (values * chosen) @ sae.decoder - error
        spread = (error - error.mean(dim=0)).square().sum(dim=1).mean()
        loss = loss + weight * missed.square().sum(dim=1).mean() / spread
    return loss


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("dead", [[], [4], [0, 3, 7, 8, 15]])
def test_gradient_is_that_of_the_definition(dead: list[int], rectified: bool) -> None:
    sae, x, places = _dictionary(), _activations(), torch.tensor(dead, dtype=torch.int64)
    k_aux = min(3, len(dead))
    loss = _dense_loss(sae, x, places, k_aux, 0.3, rectified)
    wanted = torch.autograd.grad(loss, list(sae.parameters()))
    outcome = add_gradient(sae, x, K, places, 3, 0.3, rectified)
    torch.testing.assert_close(outcome.reconstruction + 0.3 * outcome.auxiliary, loss.detach())
    for parameter, gradient in zip(sae.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def _with_a_dead_latent() -> Dictionary:
    sae = _dictionary()
    with torch.no_grad():
        sae.bias[5] = -100.0
    return sae


def test_a_dead_latent_gets_gradient_from_its_pre_activation() -> None:
    sae = _with_a_dead_latent()
    add_gradient(sae, _activations(), K, torch.tensor([5]), 3, 1 / 32)
    for parameter in (sae.encoder, sae.decoder, sae.bias):
        assert parameter.grad is not None
        assert parameter.grad[5].norm() > 1e-3


def test_behind_a_rectifier_it_gets_none() -> None:
    sae = _with_a_dead_latent()
    outcome = add_gradient(sae, _activations(), K, torch.tensor([5]), 3, 1 / 32, True)
    for parameter in (sae.encoder, sae.decoder, sae.bias):
        assert parameter.grad is not None
        assert parameter.grad[5].norm() == 0
    # With a loss of sum |e|^2 / sum |e - mean|^2: nothing of the error is explained.
    error = -outcome.residual
    expected = error.square().sum() / (error - error.mean(dim=0)).square().sum()
    torch.testing.assert_close(outcome.auxiliary, expected)


def test_a_batch_without_spread_has_no_auxiliary_loss() -> None:
    sae, x = _dictionary(), _activations()[:1].expand(4, -1)
    outcome = add_gradient(sae, x, K, torch.tensor([5]), 3, 1 / 32)
    assert outcome.auxiliary == 0
    assert all(bool(p.grad.isfinite().all()) for p in sae.parameters() if p.grad is not None)
