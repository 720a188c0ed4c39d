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
    sums = _SumsByLatent(codes.indices, len(sae.bias))
    sae.decoder.grad = sums.of_rows(codes.values, slope)
    sae.encoder.grad = sums.of_rows(code_slope, centred)
    sae.bias.grad = sums.of(code_slope)
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
    slope = missed * (2 * weight / (len(missed) * spread))  # [N, d], of ehat
    # A batch without spread teaches nothing; a test of the loss would wait for the device.
    varied = loss.isfinite()
    loss, slope = loss.where(varied, 0.0), slope.where(varied, 0.0)
    code_slope = decoded.code_slope(slope)  # [N, k_aux]
    if aux == "rectified":
        code_slope = code_slope * (values > 0)
    sums = _SumsByLatent(codes.indices, len(sae.bias))
    for parameter, more in (
        (sae.decoder, sums.of_rows(codes.values, slope)),
        (sae.encoder, sums.of_rows(code_slope, centred)),
        (sae.bias, sums.of(code_slope)),
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


class _SumsByLatent:
    """Sums over the (n, k) that chose each of F latents."""

    def __init__(self, indices: Tensor, latents: int) -> None:
        """Args:
        indices: int64 [N, K], the latents of each activation.
        """
        self._flat, self._latents = indices.flatten(), latents  # [N K]
        # Codes sorted by latent, so that each latent's codes are one bag.
        self._order = self._flat.argsort()
        self._activation = self._order // indices.shape[1]  # which each code belongs to
        ones = torch.ones_like(self._flat)
        counts = ones.new_zeros(latents).index_add_(0, self._flat, ones)  # [F]
        self._begins = counts.cumsum(0) - counts

    def of_rows(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Of weights_nk rows_n, [F, d], for weights [N, K] and rows [N, d]."""
        return functional.embedding_bag(
            self._activation,
            rows,
            self._begins,
            mode="sum",
            per_sample_weights=weights.flatten()[self._order].to(rows.dtype),
        )

    def of(self, weights: Tensor) -> Tensor:
        """Of weights_nk, [F]."""
        return weights.new_zeros(self._latents).index_add_(0, self._flat, weights.flatten())
