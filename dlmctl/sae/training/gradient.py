"""Loss and gradient of an autoencoder, written out so that no [N, F] gradient is ever made.

    L_rec = sum_g mean_n |xhat_gn - x_n|^2,   xhat_g = centre + sum of z_j W_dec[j] over j < F_g
    L_aux = mean_n |ehat_n - e_n|^2 / mean_n |e_n - mean e|^2,     e = x - xhat, a constant
    L     = L_rec + weight L_aux

The codes z of a batch are the K largest pre-activations of each activation (`topk`), or the N K
largest of all N of them (`batchtopk`: Bussmann et al. 2024, arXiv 2412.06410). There is one g, with
F_g = F, except in `matryoshka`: BatchTopK with a loss for each of several prefixes of the
dictionary, F_1 < ... < F_G = F (Bussmann et al. 2025, arXiv 2503.17547). xhat is xhat_G. In the
gradient, latent j meets the sum of the slopes of all prefixes that contain it.

In L_aux, ehat = z_aux W_dec, without a bias, comes from the k_aux dead latents with the largest
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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.settings.sae import Aux, SaeKind


class SaeWeights(nn.Module):
    """The weights of an autoencoder during training, with a row for each latent."""

    def __init__(self, d_in: int, d_sae: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype))
        self.decoder = nn.Parameter(torch.zeros(d_sae, d_in, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(d_sae, dtype=dtype))
        self.centre = nn.Parameter(torch.zeros(d_in, dtype=dtype))


class Choice(NamedTuple):
    """The M pairs of an activation and a latent of its code, in the order of the activations.

    Within an activation they are in the order of its G groups of latents, those between one prefix
    and the next.
    """

    values: Tensor
    """[M], at least 0."""
    latents: Tensor
    """int64 [M]"""
    activations: Tensor
    """int64 [M]"""
    groups: Tensor
    """int64 [M], activation G + group."""
    begins: Tensor
    """int64 [N G], the first pair of each group."""

    @property
    def active(self) -> Tensor:
        """bool [M]"""
        return self.values > 0


def choose(pre: Tensor, k: int, kind: SaeKind = "topk", prefixes: Sequence[int] = ()) -> Choice:
    """The codes of pre-activations [N, F], of which there are N K, zeros included.

    Args:
        prefixes: F_1, ..., F_G of `matryoshka`.
    """
    if kind == "topk":
        values, latents = pre.topk(k, dim=1, sorted=False)  # [N, K]
        return _choice(values.relu(), latents)
    rows, width = pre.shape
    places = pre.flatten().topk(rows * k, sorted=False).indices.sort().values  # [M]
    activations, latents = places // width, places % width
    ends = torch.tensor(prefixes or [width], device=pre.device)  # [G]
    groups = activations * len(ends) + torch.bucketize(latents, ends, right=True)
    begins = torch.searchsorted(groups, torch.arange(rows * len(ends), device=pre.device))
    values = pre.flatten()[places].relu()
    return Choice(values, latents, activations, groups, begins)


def _choice(values: Tensor, latents: Tensor) -> Choice:
    """K for each of N activations, [N, K]."""
    rows, k = values.shape
    begins = torch.arange(0, rows * k, k, device=values.device)
    activations = torch.arange(rows, device=values.device).repeat_interleave(k)
    return Choice(values.flatten(), latents.flatten(), activations, activations, begins)


class Outcome(NamedTuple):
    """The forward pass of a batch of N activations of width d."""

    codes: Choice
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
    kind: SaeKind = "topk",
    prefixes: Sequence[int] = (),
) -> Outcome:
    """Set the gradients of L for a batch.

    Args:
        x: activations [N, d].
        dead: int64 [D], the dead latents.
        k_aux: maximum number of dead latents in L_aux; `input` takes K instead.
        weight: of L_aux.
        prefixes: F_1, ..., F_G of `matryoshka`.
    """
    # 1. Codes and reconstruction. The first product is in low precision under autocast; what
    # follows has the precision of the weights.
    centred = x - sae.centre  # [N, d]
    pre = functional.linear(centred, sae.encoder, sae.bias).to(sae.encoder.dtype)  # [N, F]
    codes = choose(pre, k, kind, prefixes)
    decoded = Decoded(codes, sae.decoder)
    # The reconstruction from each prefix, [N, G, d], less x.
    residuals = _sums_so_far(decoded.rows.view(len(x), -1, x.shape[1])) + sae.centre - x[:, None]
    reconstruction = residuals.square().sum(dim=2).sum(dim=1).mean()
    # 2. Gradient of L_rec. A group of latents is part of its own prefix and of all longer ones.
    slopes = residuals * (2 / len(x))  # [N, G, d], dL_rec / dxhat_g
    slopes = _sums_so_far(slopes.flip(1)).flip(1)
    slope = slopes.flatten(0, 1)  # [N G, d]
    code_slope = decoded.code_slope(slope) * codes.active  # [M], dL_rec / dpre
    sums = _SumsByLatent(codes.latents, len(sae.bias))
    sae.decoder.grad = sums.of_rows(codes.values, slope, codes.groups)
    sae.encoder.grad = sums.of_rows(code_slope, centred, codes.activations)
    sae.bias.grad = sums.of(code_slope)
    # 3. Gradient of L_aux.
    centre_slope = sae.bias.grad  # [F]: the centre gets -(dL / dpre) @ encoder
    auxiliary = reconstruction.new_zeros(())
    if len(dead) and weight:
        target, count = (centred, k) if aux == "input" else (-residuals[:, -1], k_aux)
        auxiliary = _add_auxiliary(sae, centred, pre, target, dead, count, weight, aux)
        if aux in ("pre", "rectified"):
            centre_slope = sae.bias.grad
    sae.centre.grad = slopes[:, 0].sum(dim=0) - centre_slope @ sae.encoder
    return Outcome(codes, residuals[:, -1], reconstruction, auxiliary)


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
    codes = _choice(values if aux == "pre" else values.relu(), dead[places])
    decoded = Decoded(codes, sae.decoder)
    missed = decoded.rows - target  # [N, d]
    loss = missed.square().sum(dim=1).mean() / spread
    slope = missed * (2 * weight / (len(missed) * spread))  # [N, d], of ehat
    # A batch without spread teaches nothing; a test of the loss would wait for the device.
    varied = loss.isfinite()
    loss, slope = loss.where(varied, 0.0), slope.where(varied, 0.0)
    code_slope = decoded.code_slope(slope)  # [N k_aux]
    if aux == "rectified":
        code_slope = code_slope * codes.active
    sums = _SumsByLatent(codes.latents, len(sae.bias))
    for parameter, more in (
        (sae.decoder, sums.of_rows(codes.values, slope, codes.groups)),
        (sae.encoder, sums.of_rows(code_slope, centred, codes.activations)),
        (sae.bias, sums.of(code_slope)),
    ):
        assert parameter.grad is not None
        parameter.grad = parameter.grad + more
    return loss


def _sums_so_far(x: Tensor) -> Tensor:
    """Along the second of three dimensions."""
    return x.cumsum(dim=1) if x.shape[1] > 1 else x


class Decoded:
    """sum_j z_j W_dec[j] over the pairs of each group, and the way back to the codes."""

    def __init__(self, codes: Choice, decoder: Tensor) -> None:
        with torch.enable_grad():
            self._values = codes.values.detach().requires_grad_()
            self._rows = functional.embedding_bag(
                codes.latents,
                decoder.detach(),
                codes.begins,
                mode="sum",
                per_sample_weights=self._values,
            )
        self.rows = self._rows.detach()
        """[N G, d]."""

    def code_slope(self, slope: Tensor) -> Tensor:
        """<slope, W_dec[j]> for each pair, [M], from the gradient [N G, d] of the rows."""
        [found] = torch.autograd.grad(self._rows, self._values, slope)
        return found


class _SumsByLatent:
    """Sums over the pairs that have each of F latents."""

    def __init__(self, latents: Tensor, count: int) -> None:
        """Args:
        latents: int64 [M], those of the pairs.
        count: F.
        """
        self._latents, self._count = latents, count
        # Pairs sorted by latent, so that each latent's pairs are one bag.
        self._order = latents.argsort()
        ones = torch.ones_like(latents)
        counts = ones.new_zeros(count).index_add_(0, latents, ones)  # [F]
        self._begins = counts.cumsum(0) - counts

    def of_rows(self, weights: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Of weights_m rows[places_m], [F, d], for weights and int64 places [M]."""
        return functional.embedding_bag(
            places[self._order],
            rows,
            self._begins,
            mode="sum",
            per_sample_weights=weights[self._order].to(rows.dtype),
        )

    def of(self, weights: Tensor) -> Tensor:
        """Of weights_m, [F]."""
        return weights.new_zeros(self._count).index_add_(0, self._latents, weights)
