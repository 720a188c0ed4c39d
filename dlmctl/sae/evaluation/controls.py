"""What stands in for activations: a reconstruction, or something that it is compared with.

    reconstruction   xhat = decode(encode(x))
    zero, mean       0, or the mean activation at these positions (ablation)
    gaussian         x + |xhat - x| g / |g|, g standard normal: an error of the same norm without
                     the autoencoder's directions
    pca              m + V C V^T (x - m), V [d, r] the first r principal components of activations
                     of the kind that the autoencoder is for, r the least number that explains the
                     share of variance that the autoencoder explains there; C is 1 on the diagonal
                     but for the last component, which is shortened so that it is the same share

Means and components are those of a sample: the first `SAMPLE` documents of the corpus, which are
seen once before anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.noise import normal
from dlmctl.models.float32_products import whole_products
from dlmctl.sae.chunks import encode_chunks, reconstruct
from dlmctl.sae.corpus import MaskedBatch
from dlmctl.sae.evaluation.insertion import Replacement
from dlmctl.sae.topk import TopKSae

SAMPLE = 1024
NOISE = 2**22
"""Random numbers that are drawn at once."""
SLACK = 1e-9
"""By which the variance explained may fall short: rounding must not add a component."""


def reconstruction(sae: TopKSae) -> Replacement:
    """decode(encode(x))."""

    def replace(x: Tensor, _: Tensor) -> Tensor:
        return reconstruct(sae, x.to(sae.W_enc.dtype))

    return replace


def constant(value: Tensor | float) -> Replacement:
    """The same vector [d], or number, everywhere."""
    return lambda x, _: torch.zeros_like(x) + torch.as_tensor(value, dtype=x.dtype, device=x.device)


def gaussian(sae: TopKSae) -> Replacement:
    """Noise of the norm of the error, which is the same whatever a token is batched with."""

    def replace(x: Tensor, keys: Tensor) -> Tensor:
        x = x.to(sae.W_enc.dtype)
        norms = (reconstruct(sae, x) - x).norm(dim=1, keepdim=True)  # [N, 1]
        rows = max(1, NOISE // x.shape[1])
        noise = [_directions(part, x.shape[1]).to(x.dtype) for part in keys.split(rows)]
        return x + norms * torch.cat(noise)

    return replace


def _directions(keys: Tensor, width: int) -> Tensor:
    """A random direction for each key, float64 [N, d]."""
    noise = normal(keys[:, None], torch.arange(width, device=keys.device))
    return noise / noise.norm(dim=1, keepdim=True)


class Components(NamedTuple):
    """Principal components of activations."""

    mean: Tensor
    """[d]."""
    basis: Tensor
    """[d, r], V, orthonormal columns."""
    weights: Tensor
    """[r], the diagonal of C."""

    def replace(self, x: Tensor, _: Tensor) -> Tensor:
        """m + V C V^T (x - m)."""
        with whole_products():
            coefficients = (x.to(self.mean.dtype) - self.mean) @ self.basis  # [N, r]
            return self.mean + coefficients * self.weights @ self.basis.T


class Moments:
    """Mean and covariance of activations, float64 on their device."""

    def __init__(self, products: bool = False) -> None:
        """Args:
        products: whether the covariance is wanted too.
        """
        self.count = 0
        self._products = products
        self._centre: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in activations [N, d]."""
        if not len(x):
            return
        x = x.double()
        if self._centre is None:  # sums are about the first mean, so that nothing cancels
            self._centre = x.mean(dim=0)
            self._sum = torch.zeros_like(self._centre)
            width = len(self._centre) if self._products else 0
            self._square = x.new_zeros(width, width)
        x = x - self._centre
        self.count += len(x)
        self._sum += x.sum(dim=0)
        if self._products:
            self._square += x.T @ x

    @property
    def mean(self) -> Tensor:
        """[d]; there must have been an activation."""
        assert self._centre is not None
        return self._centre + self._sum / self.count

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Sums of squares about the mean along the principal axes [d], descending; axes [d, d]."""
        shift = self._sum / self.count
        values, axes = torch.linalg.eigh(self._square - self.count * torch.outer(shift, shift))
        return values.flip(0).clamp(min=0), axes.flip(1)


class Explained:
    """Activations of the kind that an autoencoder is for, and its error on them, over a sample."""

    def __init__(self, sae: TopKSae) -> None:
        self._sae, self._moments, self._error = sae, Moments(products=True), 0.0

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in activations [N, d]."""
        x = x.to(self._sae.W_enc.dtype)
        self._moments.add(x)
        for part, codes in encode_chunks(self._sae, x):
            error = self._sae.decode(codes).double() - part.double()
            self._error += float(error.square().sum())

    def components(self) -> Components | None:
        """As many as explain what the autoencoder explains; None without an activation."""
        if not self._moments.count:
            return None
        spread, axes = self._moments.spectrum()  # [d], [d, d]
        total = float(spread.sum())
        left = torch.cat([spread.sum()[None], total - spread.cumsum(0)])  # by 0, 1, … components
        rank = int((left > self._error + SLACK * total).sum())
        weights = torch.ones(rank, dtype=spread.dtype, device=spread.device)
        if rank:  # (1 - weight)^2 of what the last one explains is left, too
            beyond = (self._error - left[rank]).clamp(min=0) / spread[rank - 1]
            weights[-1] = 1 - beyond.clamp(max=1).sqrt()
        parts = self._moments.mean, axes[:, :rank], weights
        return Components(*(part.to(self._sae.W_enc.dtype) for part in parts))


def sampled(batches: Iterable[MaskedBatch]) -> tuple[list[MaskedBatch], Iterator[MaskedBatch]]:
    """The batches that have the first `SAMPLE` documents, and all batches."""
    rest, first, found = iter(batches), [], 0
    for batch in rest:
        first.append(batch)
        found += int(in_sample(batch).sum())
        if found == SAMPLE:
            break
    return first, chain(first, rest)


def in_sample(batch: MaskedBatch) -> Tensor:
    """bool [B], on the CPU."""
    return torch.tensor([document.number < SAMPLE for document in batch.documents])
