"""The written-out gradient against automatic differentiation of the definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dlmctl.sae.training.gradient import SaeWeights, add_gradient, choose
from dlmctl.settings.sae import Aux, SaeKind

D, F, N, K = 6, 20, 9, 3
KINDS: list[tuple[SaeKind, list[int]]] = [
    ("topk", []), ("batchtopk", []), ("matryoshka", [2, 3, 11, F]),
]  # fmt: skip


def _dictionary(seed: int = 0) -> SaeWeights:
    sae = SaeWeights(D, F, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_(generator=generator)
        sae.decoder.copy_(functional.normalize(sae.decoder, dim=1))
    return sae


def _activations(seed: int = 1) -> Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _kept(pre: Tensor, kind: SaeKind) -> Tensor:
    """1 where a latent is chosen, of each activation or of the batch."""
    groups = pre if kind == "topk" else pre.reshape(1, -1)
    places = groups.topk(K * len(pre) // len(groups), dim=1).indices
    return torch.zeros_like(groups).scatter(1, places, 1.0).view_as(pre)


def _dense_loss(
    sae: SaeWeights,
    x: Tensor,
    dead: Tensor,
    k_aux: int,
    weight: float,
    aux: Aux,
    kind: SaeKind = "topk",
    prefixes: Sequence[int] = (),
) -> Tensor:
    """L as it is defined, with dense codes."""
    pre = (x - sae.centre) @ sae.encoder.T + sae.bias
    codes = pre.relu() * _kept(pre, kind)
    loss = x.new_zeros(())
    for end in prefixes or [F]:
        made = codes[:, :end] @ sae.decoder[:end] + sae.centre
        loss = loss + (made - x).square().sum(dim=1).mean()
    if len(dead):
        target = (x - (sae.centre if aux == "input" else made)).detach()
        if aux in ("straight", "input"):  # the centre takes no part
            pre = (x - sae.centre.detach()) @ sae.encoder.T + sae.bias
        alive = torch.ones(F, dtype=torch.bool).index_fill(0, dead, False)
        count = min(K, len(dead)) if aux == "input" else k_aux
        places = pre.masked_fill(alive, -torch.inf).topk(count, dim=1).indices
        chosen = torch.zeros_like(pre).scatter(1, places, 1.0)
        values = pre if aux == "pre" else pre.relu()
        if aux in ("straight", "input"):
            values = pre + (values - pre).detach()
        missed = (values * chosen) @ sae.decoder - target
        spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
        loss = loss + weight * missed.square().sum(dim=1).mean() / spread
    return loss


@pytest.mark.parametrize(("kind", "prefixes"), KINDS)
@pytest.mark.parametrize("aux", get_args(Aux))
@pytest.mark.parametrize("dead", [[], [4], [0, 3, 7, 8, 15]])
def test_gradient_is_that_of_the_definition(
    dead: list[int], aux: Aux, kind: SaeKind, prefixes: list[int]
) -> None:
    sae, x, places = _dictionary(), _activations(), torch.tensor(dead, dtype=torch.int64)
    k_aux = min(3, len(dead))
    loss = _dense_loss(sae, x, places, k_aux, 0.3, aux, kind, prefixes)
    wanted = torch.autograd.grad(loss, list(sae.parameters()))
    outcome = add_gradient(sae, x, K, places, 3, 0.3, aux, kind, prefixes)
    found = outcome.reconstruction + 0.3 * outcome.auxiliary
    torch.testing.assert_close(found, loss.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(sae.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kind", "prefixes"), KINDS)
@pytest.mark.parametrize("shift", [0.0, -8.0])
def test_a_choice_is_the_dense_codes(kind: SaeKind, prefixes: list[int], shift: float) -> None:
    """Also where an activation has no latent, and where too few of the batch are positive."""
    pre = _pre(_dictionary(), _activations()).detach() + shift
    pre[2] -= 50.0
    codes = choose(pre, K, kind, prefixes)
    dense = torch.zeros_like(pre)
    dense[codes.activations, codes.latents] = codes.values
    assert torch.equal(dense, pre.relu() * _kept(pre, kind))
    assert len(codes.values) == N * K
    counts = (dense > 0).sum(dim=1)
    assert counts[2] == 0
    if kind != "topk":
        assert counts.max() > K or shift
        assert (counts.sum() < N * K) == bool(shift)


def _with_a_dead_latent() -> SaeWeights:
    sae = _dictionary()
    with torch.no_grad():
        sae.bias[5] = -100.0
    return sae


def test_straight_through_the_rectifier_dead_encoders_turn_to_the_error() -> None:
    sae, x, dead = _with_a_dead_latent(), _activations(), torch.tensor([5, 7])
    with torch.no_grad():
        sae.bias[7] = 50.0  # above 0: here the gradient is that of the rectified loss
    alone = _gradients(sae, x, torch.empty(0, dtype=torch.int64), "straight")
    found = _gradients(sae, x, dead, "straight")
    rectified = _gradients(sae, x, dead, "rectified")
    outcome = add_gradient(sae, x, K, dead, 3, 0.3, "straight")
    error = -outcome.residual
    missed = torch.relu(_pre(sae, x)[:, 7:8]) * sae.decoder[7] - error
    spread = (error - error.mean(dim=0)).square().sum(dim=1).mean()
    pull = (2 * 0.3 / (N * spread) * missed) @ sae.decoder[5]
    expected = (pull[:, None] * (x - sae.centre)).sum(dim=0)
    torch.testing.assert_close(found["encoder"][5], expected.detach())
    assert found["decoder"][5].norm() == 0
    torch.testing.assert_close(found["encoder"][7], rectified["encoder"][7])
    torch.testing.assert_close(found["decoder"], rectified["decoder"])
    assert torch.equal(found["centre"], alone["centre"])


def _pre(sae: SaeWeights, x: Tensor) -> Tensor:
    return (x - sae.centre) @ sae.encoder.T + sae.bias


def _gradients(sae: SaeWeights, x: Tensor, dead: Tensor, aux: Aux) -> dict[str, Tensor]:
    add_gradient(sae, x, K, dead, 3, 0.3, aux)
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("aux", ["pre", "straight", "input"])
def test_a_dead_latent_gets_gradient(aux: Aux) -> None:
    sae = _with_a_dead_latent()
    add_gradient(sae, _activations(), K, torch.tensor([5]), 3, 1 / 32, aux)
    for parameter in (sae.encoder, sae.bias):
        assert parameter.grad is not None
        assert parameter.grad[5].norm() > 1e-5


def test_behind_a_rectifier_it_gets_none() -> None:
    sae = _with_a_dead_latent()
    outcome = add_gradient(sae, _activations(), K, torch.tensor([5]), 3, 1 / 32, "rectified")
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
