"""Loss and gradient of a Top-K autoencoder, written out: no [N, F] gradient is ever made.

    L_rec = mean_n |xhat_n - x_n|^2
    L_aux = mean_n |ehat_n - e_n|^2 / mean_n |e_n - mean e|^2,     e = x - xhat, taken as given
    L     = L_rec + weight L_aux

where ehat = z_aux W_dec, without a bias, is made of the k_aux dead latents with the largest
pre-activations (Gao et al. 2024, arXiv 2406.04093, appendix A.2; DLM-Scope, arXiv 2602.05859).
What z_aux is of them, by `aux`:

    rectified   their ReLU, as published. A dead latent is rarely above 0, so that the loss is a
                constant and teaches nothing.
    pre         the pre-activations as they are, negative ones too, as in SAELens. They get
                gradient, but a latent is trained to explain by its absence, and disturbs the
                others when it comes back.
    straight    their ReLU, through which the gradient passes to the encoder as if it were not
                there: the encoder turns to the tokens whose error points along the decoder, and
                nothing else changes until the latent is active. The centre, which all latents
                share, takes no part. (Ours.)
    input       as straight, but K of the dead latents reconstruct x - centre, as if there were no
                others: e is x - centre in L_aux. What the living leave is little and varied, and
                few latents learn from it to outdo a living one; of the input there is always
                enough. (Ours.)

A latent's weights get gradient from the few tokens that chose it. Those sums over tokens are one
pass of `embedding_bag` with the codes sorted by latent, which costs K/F of a product of matrices.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.sae.topk import Codes
from dlmctl.settings.sae import Aux


class SaeWeights(nn.Module):
    """The weights of a Top-K autoencoder as training has them: a row for each latent."""

    def __init__(self, d_in: int, d_sae: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype))
        self.decoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.centre = nn.Parameter(torch.zeros(d_in, dtype=dtype))


class Outcome(NamedTuple):
    """What a batch of N activations of width d came to."""

    codes: Codes
    residual: Tensor
    """[N, d], xhat - x."""
    reconstruction: Tensor
    """L_rec, a number."""
    auxiliary: Tensor
    """L_aux, a number; 0 without dead latents."""


@torch.no_grad()
def add_gradient(
    sae: SaeWeights,
    x: Tensor,
    k: int,
    dead: Tensor,
    k_aux: int,
    weight: float,
    aux: Aux = "straight",
) -> Outcome:
    """Set the gradients of L for a batch.

    Args:
        x: activations [N, d].
        dead: int64 [D], the dead latents.
        k_aux: how many of them L_aux is made of, at most; `input` takes K.
        weight: of L_aux.
        aux: what it is made of.
    """
    centred = x - sae.centre
    # A product in low precision under autocast; what follows is as wide as the weights.
    pre = functional.linear(centred, sae.encoder, sae.bias).to(sae.encoder.dtype)
    values, indices = pre.topk(k, dim=1, sorted=False)
    codes = Codes(values.relu(), indices)
    made, pull = _combined(codes, sae.decoder)
    residual = made + sae.centre - x
    reconstruction = residual.square().sum(dim=1).mean()
    slope = residual * (2 / len(x))
    towards = pull(slope) * (codes.values > 0)
    sae.decoder.grad = _sums(codes.indices, codes.values, slope, len(sae.bias))
    sae.encoder.grad = _sums(codes.indices, towards, centred, len(sae.bias))
    sae.bias.grad = _counts(codes.indices, towards, len(sae.bias))
    from_bias = sae.bias.grad
    auxiliary = reconstruction.new_zeros(())
    if len(dead) and weight:
        target, count = (centred, k) if aux == "input" else (-residual, k_aux)
        auxiliary = _add_auxiliary(sae, centred, pre, target, dead, count, weight, aux)
        if aux in ("pre", "rectified"):
            from_bias = sae.bias.grad
    sae.centre.grad = slope.sum(dim=0) - from_bias @ sae.encoder
    return Outcome(codes, residual, reconstruction, auxiliary)


def _add_auxiliary(
    sae: SaeWeights,
    centred: Tensor,
    pre: Tensor,
    target: Tensor,
    dead: Tensor,
    count: int,
    weight: float,
    aux: Aux,
) -> Tensor:
    """Add the gradient of weight L_aux, but not that of the centre."""
    spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
    values, places = pre[:, dead].topk(min(count, len(dead)), dim=1, sorted=False)
    codes = Codes(values if aux == "pre" else values.relu(), dead[places])
    made, pull = _combined(codes, sae.decoder)
    missed = made - target
    loss = missed.square().sum(dim=1).mean() / spread
    if not bool(loss.isfinite()):  # a batch without spread teaches nothing
        return torch.zeros_like(loss)
    slope = missed * (2 * weight / (len(missed) * spread))
    towards = pull(slope)
    if aux == "rectified":
        towards = towards * (values > 0)
    for parameter, more in (
        (sae.decoder, _sums(codes.indices, codes.values, slope, len(sae.bias))),
        (sae.encoder, _sums(codes.indices, towards, centred, len(sae.bias))),
        (sae.bias, _counts(codes.indices, towards, len(sae.bias))),
    ):
        assert parameter.grad is not None
        parameter.grad = parameter.grad + more
    return loss


class _Pull(NamedTuple):
    """The gradient of codes from that of what they were combined to."""

    made: Tensor
    values: Tensor

    def __call__(self, slope: Tensor) -> Tensor:
        """<slope_n, W_dec[j]> for each code, [N, K], from [N, d]."""
        [towards] = torch.autograd.grad(self.made, self.values, slope)
        return towards


def _combined(codes: Codes, rows: Tensor) -> tuple[Tensor, _Pull]:
    """sum_j z_j rows_j for each code, [N, d], and the way back to the codes."""
    with torch.enable_grad():
        values = codes.values.detach().requires_grad_()
        made = functional.embedding_bag(
            codes.indices, rows.detach(), mode="sum", per_sample_weights=values
        )
    return made.detach(), _Pull(made, values)


def _sums(indices: Tensor, weights: Tensor, rows: Tensor, latents: int) -> Tensor:
    """For each latent the sum of weights_nk rows_n over the (n, k) that chose it, [F, d]."""
    flat = indices.flatten()
    order = flat.argsort()
    counts = torch.bincount(flat, minlength=latents)
    return functional.embedding_bag(
        order // indices.shape[1],
        rows,
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=weights.flatten()[order].to(rows.dtype),
    )


def _counts(indices: Tensor, weights: Tensor, latents: int) -> Tensor:
    """For each latent the sum of weights_nk, [F]."""
    return weights.new_zeros(latents).index_add_(0, indices.flatten(), weights.flatten())
