"""Loss and gradient of a Top-K autoencoder, written out so that no [N, F] gradient is ever made.

    L_rec = mean_n |xhat_n - x_n|^2
    L_aux = mean_n |ehat_n - e_n|^2 / mean_n |e_n - mean e|^2,     e = x - xhat, a constant
    L     = L_rec + weight L_aux

where ehat = z_aux W_dec, without a bias, comes from the k_aux dead latents with the largest
pre-activations (Gao et al. 2024, arXiv 2406.04093, appendix A.2; DLM-Scope, arXiv 2602.05859).
z_aux depends on `aux`:

    rectified   their ReLU, as published. A dead latent is rarely above 0, so the loss is almost a
                constant and teaches nothing.
    pre         the pre-activations as they are, negative ones too, as in SAELens. They get
                gradient, but a latent learns to explain by its absence, and disturbs the others
                when it revives.
    straight    (ours) their ReLU, with a straight-through gradient to the encoder: it turns to the
                tokens whose error points along the decoder, and nothing else changes until the
                latent is active. The centre, which all latents share, gets no gradient.
    input       (ours) as straight, but K of the dead latents reconstruct x - centre as if there
                were no others: e is x - centre in L_aux. What the living latents leave is little
                and varied, and few dead latents learn enough from it to outdo a living one; the
                input is always enough.

A latent's weights get gradient only from the few tokens that chose it. These sums over tokens are
one pass of `embedding_bag` with the codes sorted by latent, at K/F of the cost of a matrix product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.sae.topk import Codes
from dlmctl.settings.sae import Aux


class SaeWeights(nn.Module):
    """The weights of a Top-K autoencoder during training, with a row for each latent."""

    def __init__(self, d_in: int, d_sae: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype))
        self.decoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.centre = nn.Parameter(torch.zeros(d_in, dtype=dtype))


class Outcome(NamedTuple):
    """The forward pass of a batch of N activations of width d."""

    codes: Codes
    residual: Tensor
    """[N, d], xhat - x."""
    reconstruction: Tensor
    """L_rec, a scalar."""
    auxiliary: Tensor
    """L_aux, a scalar; 0 without dead latents."""


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
        k_aux: maximum number of dead latents in L_aux; `input` takes K instead.
        weight: of L_aux.
    """
    # 1. Codes and reconstruction. The first product is in low precision under autocast; what
    # follows has the precision of the weights.
    centred = x - sae.centre  # [N, d]
    pre = functional.linear(centred, sae.encoder, sae.bias).to(sae.encoder.dtype)  # [N, F]
    values, indices = pre.topk(k, dim=1, sorted=False)  # [N, K]
    codes = Codes(values.relu(), indices)
    decoded = _Decoded(codes, sae.decoder)
    residual = decoded.rows + sae.centre - x  # [N, d]
    reconstruction = residual.square().sum(dim=1).mean()
    # 2. Gradient of L_rec.
    slope = residual * (2 / len(x))  # [N, d], dL_rec / dxhat
    code_slope = decoded.code_slope(slope) * (codes.values > 0)  # [N, K], dL_rec / dpre
    sae.decoder.grad = _sum_rows(codes.indices, codes.values, slope, len(sae.bias))
    sae.encoder.grad = _sum_rows(codes.indices, code_slope, centred, len(sae.bias))
    sae.bias.grad = _sum_weights(codes.indices, code_slope, len(sae.bias))
    # 3. Gradient of L_aux.
    centre_slope = sae.bias.grad  # [F]: the centre gets -(dL / dpre) @ encoder
    auxiliary = reconstruction.new_zeros(())
    if len(dead) and weight:
        target, count = (centred, k) if aux == "input" else (-residual, k_aux)
        auxiliary = _add_auxiliary(sae, centred, pre, target, dead, count, weight, aux)
        if aux in ("pre", "rectified"):
            centre_slope = sae.bias.grad
    sae.centre.grad = slope.sum(dim=0) - centre_slope @ sae.encoder
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
    """Add the gradient of weight L_aux, except that of the centre; returns L_aux.

    Args:
        target: e, [N, d].
        count: how many of the dead latents each activation gets.
    """
    spread = (target - target.mean(dim=0)).square().sum(dim=1).mean()
    values, places = pre[:, dead].topk(min(count, len(dead)), dim=1, sorted=False)  # [N, k_aux]
    codes = Codes(values if aux == "pre" else values.relu(), dead[places])
    decoded = _Decoded(codes, sae.decoder)
    missed = decoded.rows - target  # [N, d]
    loss = missed.square().sum(dim=1).mean() / spread
    if not bool(loss.isfinite()):  # a batch without spread teaches nothing
        return torch.zeros_like(loss)
    slope = missed * (2 * weight / (len(missed) * spread))  # [N, d], of ehat
    code_slope = decoded.code_slope(slope)  # [N, k_aux]
    if aux == "rectified":
        code_slope = code_slope * (values > 0)
    for parameter, more in (
        (sae.decoder, _sum_rows(codes.indices, codes.values, slope, len(sae.bias))),
        (sae.encoder, _sum_rows(codes.indices, code_slope, centred, len(sae.bias))),
        (sae.bias, _sum_weights(codes.indices, code_slope, len(sae.bias))),
    ):
        assert parameter.grad is not None
        parameter.grad = parameter.grad + more
    return loss


class _Decoded:
    """sum_j z_j W_dec[j] for each code, and the way back to the codes."""

    def __init__(self, codes: Codes, decoder: Tensor) -> None:
        with torch.enable_grad():
            self._values = codes.values.detach().requires_grad_()
            self._rows = functional.embedding_bag(
                codes.indices, decoder.detach(), mode="sum", per_sample_weights=self._values
            )
        self.rows = self._rows.detach()
        """[N, d]."""

    def code_slope(self, slope: Tensor) -> Tensor:
        """<slope_n, W_dec[j]> for each code, [N, K], from the gradient [N, d] of the rows."""
        [found] = torch.autograd.grad(self._rows, self._values, slope)
        return found


def _sum_rows(indices: Tensor, weights: Tensor, rows: Tensor, latents: int) -> Tensor:
    """For each latent the sum of weights_nk rows_n over the (n, k) that chose it, [F, d].

    Args:
        indices, weights: [N, K].
        rows: [N, d].
    """
    flat = indices.flatten()  # [N K]
    order = flat.argsort()  # codes sorted by latent, so that each latent's codes are one bag
    counts = torch.bincount(flat, minlength=latents)  # [F]
    return functional.embedding_bag(
        order // indices.shape[1],  # the activation that each code belongs to
        rows,
        counts.cumsum(0) - counts,  # where the bags begin
        mode="sum",
        per_sample_weights=weights.flatten()[order].to(rows.dtype),
    )


def _sum_weights(indices: Tensor, weights: Tensor, latents: int) -> Tensor:
    """For each latent the sum of weights_nk over the (n, k) that chose it, [F]."""
    return weights.new_zeros(latents).index_add_(0, indices.flatten(), weights.flatten())
