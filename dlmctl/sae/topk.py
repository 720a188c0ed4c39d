"""Sparse autoencoders: Top-K (Gao et al. 2024, arXiv 2406.04093; DLM-Scope, arXiv 2602.05859) and
JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435).

    pre  = (x - b_dec) W_enc + b_enc           [N, F]
    z    = pre where it is positive and chosen, 0 elsewhere
           Top-K: the K largest of an activation; JumpReLU: all above the threshold of their latent
    xhat = z W_dec + b_dec                     [N, d]

BatchTopK and Matryoshka autoencoders are JumpReLU autoencoders once they are trained. Codes are
kept as the values and their places: a row of F = 16,384 has 50 to 820 of them. Rows of W_dec have
norm 1 in autoencoders trained here. Some published scripts leave `- b_dec` out when they encode;
training never does, and neither does this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.models.float32_products import whole_products


class Codes(NamedTuple):
    """Sparse codes of N activations; the order within a row has no meaning.

    K is that of a Top-K autoencoder, or the largest number of latents that are active at once. A
    row with fewer has values of 0, whose indices have no meaning.
    """

    values: Tensor
    """[N, K], at least 0."""
    indices: Tensor
    """int64 [N, K], which latents; those of positive values are distinct within a row."""

    def dense(self, latents: int) -> Tensor:
        """The same as [N, F]."""
        zeros = self.values.new_zeros(len(self.values), latents)
        return zeros.scatter_add(1, self.indices, self.values)


class TopKSae(nn.Module):
    """A dictionary of F latents for activations of width d, K of which are active at once."""

    k: int | None
    """K; of a JumpReLU autoencoder the mean that it was trained for, None if it is not known."""

    def __init__(self, d_in: int, d_sae: int, k: int | None) -> None:
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(torch.zeros(d_in, d_sae))
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """[N, F] for activations [N, d]."""
        with whole_products():  # which decide what latents are active
            return torch.addmm(self.b_enc, x - self.b_dec, self.W_enc)

    def rectified(self, pre: Tensor) -> Tensor:
        """The codes [N, F] of pre-activations [N, F] if all latents that can be were chosen."""
        return pre.relu()

    def encode(self, x: Tensor) -> Codes:
        """The codes of activations [N, d]; differentiable by way of the values."""
        assert self.k is not None
        values, indices = self.pre_activations(x).topk(self.k, dim=1, sorted=False)
        return Codes(values.relu(), indices)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstructions [N, d]."""
        return combine(codes, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [N, d] of activations [N, d]."""
        return self.decode(self.encode(x))


class JumpReluSae(TopKSae):
    """A dictionary in which every latent above its threshold is active."""

    threshold: Tensor
    """[F]"""

    def __init__(self, d_in: int, d_sae: int, k: int | None = None) -> None:
        super().__init__(d_in, d_sae, k)
        self.register_buffer("threshold", torch.zeros(d_sae))

    def rectified(self, pre: Tensor) -> Tensor:
        return pre.relu().where(pre > self.threshold, 0.0)

    def encode(self, x: Tensor) -> Codes:
        values = self.rectified(self.pre_activations(x))  # [N, F]
        most = int((values > 0).sum(dim=1).max()) if len(x) else 0
        return Codes(*values.topk(max(1, most), dim=1, sorted=False))


def combine(codes: Codes, rows: Tensor) -> Tensor:
    """sum_j z_j rows_j for each code, [N, d]; touches K rows of [F, d] for each, not all F."""
    return functional.embedding_bag(
        codes.indices, rows, mode="sum", per_sample_weights=codes.values.to(rows.dtype)
    )


def random_directions(count: int, width: int, seed: int) -> Tensor:
    """Uniform on the sphere: float32 [count, width], on the CPU."""
    drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=1, keepdim=True)
