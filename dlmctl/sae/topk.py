"""Top-K sparse autoencoder (Gao et al. 2024, arXiv 2406.04093; DLM-Scope, arXiv 2602.05859).

    pre  = (x - b_dec) W_enc + b_enc           [N, F]
    z    = the K largest of pre where they are positive, 0 elsewhere
    xhat = z W_dec + b_dec                     [N, d]

Codes are kept as the K values and their places: a row of F = 16,384 has 50 to 820 of them. Rows of
W_dec have norm 1. Some published scripts leave `- b_dec` out when they encode; training never does,
and neither does this.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlmctl.models.float32_products import whole_products


class Codes(NamedTuple):
    """Sparse codes of N activations; the order within a row has no meaning."""

    values: Tensor
    """[N, K], at least 0."""
    indices: Tensor
    """int64 [N, K], which latents."""

    def dense(self, latents: int) -> Tensor:
        """The same as [N, F]."""
        zeros = self.values.new_zeros(len(self.values), latents)
        return zeros.scatter_add(1, self.indices, self.values)


class TopKSae(nn.Module):
    """A dictionary of F latents for activations of width d, K of which are active at once."""

    def __init__(self, d_in: int, d_sae: int, k: int) -> None:
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

    def encode(self, x: Tensor) -> Codes:
        """The codes of activations [N, d]; differentiable by way of the values."""
        values, indices = self.pre_activations(x).topk(self.k, dim=1, sorted=False)
        return Codes(values.relu(), indices)

    def decode(self, codes: Codes) -> Tensor:
        """Reconstructions [N, d]."""
        return combine(codes, self.W_dec) + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Reconstructions [N, d] of activations [N, d]."""
        return self.decode(self.encode(x))


def combine(codes: Codes, rows: Tensor) -> Tensor:
    """sum_j z_j rows_j for each code, [N, d]; touches K rows of [F, d] for each, not all F."""
    return functional.embedding_bag(
        codes.indices, rows, mode="sum", per_sample_weights=codes.values.to(rows.dtype)
    )
