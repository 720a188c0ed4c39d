"""Autoencoders applied to many activations, a part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from dlmctl.sae.topk import Codes, TopKSae

NUMBERS = 2**26
"""Pre-activations in memory at once, 256 MB in float32: 16,384 tokens times 65,536 latents would be
4.3 GB."""


def chunks(sae: TopKSae, x: Tensor) -> Sequence[Tensor]:
    """Activations [N, d] in parts whose pre-activations fit into memory."""
    return x.split(max(1, NUMBERS // sae.d_sae))


def encode_chunks(sae: TopKSae, x: Tensor) -> Iterator[tuple[Tensor, Codes]]:
    """Parts of activations [N, d], one after the other, with their codes."""
    for part in chunks(sae, x):
        yield part, sae.encode(part)


def encoded(sae: TopKSae, x: Tensor) -> Codes:
    """The codes of activations [N, d]."""
    with torch.no_grad():
        return join_codes([codes for _, codes in encode_chunks(sae, x)])


def reconstruct(sae: TopKSae, x: Tensor) -> Tensor:
    """Reconstructions [N, d] of activations [N, d]."""
    parts = [sae.decode(codes) for _, codes in encode_chunks(sae, x)]
    return torch.cat(parts)


def join_codes(parts: Sequence[Codes]) -> Codes:
    """The codes of several sets of tokens, one below the other.

    Rows with fewer entries get more of value 0.
    """
    width = max(part.values.shape[1] for part in parts)
    wide = [[pad(each, (0, width - each.shape[1])) for each in part] for part in parts]
    return Codes(*(torch.cat(each) for each in zip(*wide, strict=True)))
