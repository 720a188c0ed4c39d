"""Latents of sentences: the mean of a latent over the tokens of a sentence that count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dlmctl.sae.chunks import encoded
from dlmctl.sae.evaluation.halves import Half, Halves
from dlmctl.sae.logistic import Probe, equal_weights
from dlmctl.sae.topk import Codes, TopKSae, random_directions


@dataclass(frozen=True)
class SentenceCodes:
    """The latents of S sentences."""

    half: Half
    codes: Codes
    """Of the N tokens."""
    latents: int

    def means(self, features: Tensor) -> Tensor:
        """Means of distinct latents int64 [C], float64 [S, C]."""
        column = torch.full((self.latents,), -1, device=features.device)
        column[features] = torch.arange(len(features), device=features.device)
        places = column[self.codes.indices]  # [N, K], -1 for other latents
        rows = self.codes.values.new_zeros(len(places), len(features) + 1)
        rows.scatter_add_(1, places.where(places >= 0, len(features)), self.codes.values)
        return self.half.means(rows[:, :-1])

    def weighted(self, weights: Tensor) -> Tensor:
        """sum_s w_s (mean of each latent in sentence s), float64 [F], for weights [S]."""
        by_token = (weights / torch.bincount(self.half.sentence))[self.half.sentence]  # [N]
        products = self.codes.values.double() * by_token[:, None]  # [N, K]
        sums = products.new_zeros(self.latents)
        return sums.index_add_(0, self.codes.indices.flatten(), products.flatten())


@dataclass(frozen=True)
class Dictionary:
    """A dictionary and its codes of both halves."""

    method: str
    directions: Tensor
    """float32 [F, d], rows of the decoder."""
    first: SentenceCodes
    second: SentenceCodes

    def slopes(self, probe: Probe) -> Tensor:
        """How much the log-odds of a probe of activations rise with each latent, float64 [F]."""
        return self.directions.double() @ probe.weight

    def ablated(self, means: Tensor, features: Tensor) -> Tensor:
        """The mean activations of the second half without some latents.

        Each token x becomes x - sum_j z_j W_dec_j, with its code as it was and the error of the
        reconstruction kept; the mean over a sentence's tokens is linear.

        Args:
            means: float64 [S, d].
            features: int64 [C], distinct.
        """
        rows = self.directions[features].double()
        return means - self.second.means(features) @ rows


def dictionaries(sae: TopKSae, halves: Halves, seed: int) -> list[Dictionary]:
    """An autoencoder, and an untrained one with as many latents."""
    trained = _dictionary("sae", sae, halves)
    active = (trained.first.codes.values > 0).sum() / len(halves.first.states)
    untrained = random_dictionary(halves.first, sae.d_sae, max(1, round(float(active))), seed)
    return [trained, _dictionary("random", untrained, halves)]


def random_dictionary(half: Half, latents: int, active: int, seed: int) -> TopKSae:
    """A Top-K autoencoder with random directions, which also encode, about the mean activation.

    Args:
        active: K, its number of active latents.
    """
    width = half.states.shape[1]
    sae = TopKSae(width, latents, min(active, latents)).requires_grad_(False)
    sae.W_dec.copy_(random_directions(latents, width, seed))
    sae.W_enc.copy_(sae.W_dec.T)
    sae.b_dec.copy_(half.states.mean(dim=0))
    return sae.to(half.states.device)


def signed_weights(present: Tensor, stratum: Tensor | None = None) -> Tensor:
    """Weights float64 [S] that make a sum the mean with a label minus the mean without.

    Args:
        present: bool [S].
        stratum: int64 [S], parts of the two labels that count the same; None: the labels.
    """
    weights = 2 * equal_weights(present.long() if stratum is None else stratum)
    return weights.where(present, -weights)


def strongest(effects: Tensor, count: int) -> Tensor:
    """The latents with the largest of effects [F] that are not 0: int64 [C], C <= count."""
    order = effects.argsort(descending=True, stable=True)
    return order[effects[order] != 0][:count]


def _dictionary(method: str, sae: TopKSae, halves: Halves) -> Dictionary:
    codes = (
        SentenceCodes(half, encoded(sae, half.states), sae.d_sae)
        for half in (halves.first, halves.second)
    )
    return Dictionary(method, sae.W_dec.detach(), *codes)
