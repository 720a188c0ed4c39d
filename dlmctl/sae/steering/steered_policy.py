"""Steering: directions of features added to the residual stream while completions are sampled.

    H'[b,t] = H[b,t] + amplitude * m[b,t] * W_dec[f]          m[b,t] = max_j z_j(H[b,t])

H is the output of a block and z its code (DLM-Scope, arXiv 2602.05859, equations 13 and 14; the
scale m is that of its code). As decoding is affine, this equals adding amplitude * m to latent f of
the code while keeping the part of H that the autoencoder does not explain. Several features of an
autoencoder share one code, and those of two autoencoders at a layer see the same H.

In the unit `norm` (ours), m[b,t] = |H[b,t]| and the direction W_dec[f] / |W_dec[f]|, so that the
amplitude is |push| / |H|, whatever the autoencoder. In both units the mean of |push| / |H|, over
the steered positions of all passes of a completion and over the layers, is noted in its record.

Steering applies to the positions of each forward pass. With a key-value cache these are the block
and what follows it (prefix), or the block alone (dual), and the whole sequence when the cache is
renewed; an autoregressive model passes over the prompt once, and then over the newest token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.callback import SamplerCallback
from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.chunks import chunks
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer, computing_dtype, read_at_layer
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.steering import SteeredFeature, Steering

STRONGEST = 3
"""Positions of a row that the scope `topk` steers, as in DLM-Scope's code."""


class SteeredPolicy(SamplerCallback):
    """A policy steered by features, and what the records say of it.

    It is to be the callback of the sampler, which tells it whose rows a pass has.

    Raises:
        MissingInputError, DataError: an autoencoder cannot be read.
        UsageError: it does not fit the policy, or the sampler's options do not go with steering.
    """

    def __init__(self, policy: Policy, sampler: SamplerConfig, steering: Steering) -> None:
        policy.check_one_mask()
        _check(policy, sampler, steering)
        self.policy, self.steering, self.gen_length = policy, steering, sampler.gen_length
        self.dtype = computing_dtype(policy)
        time = None if steering.time is None else list(steering.time)
        self.notes: list[dict[str, Any]] = []
        """The value of `rollout.steer`."""
        saes: dict[tuple[str, int | None], SaeAtLayer] = {}
        groups: dict[tuple[str, int], tuple[TopKSae, list[SteeredFeature]]] = {}
        for steer in steering.features:
            name, layer, feature, amplitude = steer
            if (name, layer) not in saes:
                option = f"--steer {name}@LAYER:{feature}={amplitude:g}"
                saes[name, layer] = read_at_layer(name, layer, policy, option)
            _, layer, sae = saes[name, layer]
            if feature >= sae.d_sae:
                raise UsageError(f"{name} has latents 0 to {sae.d_sae - 1}, and no {feature}")
            group = groups.setdefault((name, layer), (sae, []))[1]
            if feature in [other.feature for other in group]:
                raise UsageError("--steer names a feature twice")
            group.append(steer)
            how = {"scope": steering.scope, "time": time, "unit": steering.unit}
            self.notes.append({**steer._asdict(), "layer": layer, **how})
        self._directions: dict[int, list[_Directions]] = {}
        for (_, layer), (sae, steers) in groups.items():
            at_layer = self._directions.setdefault(layer, [])
            at_layer.append(_Directions(sae, steers, steering))
        self._rows: dict[int, Sequence[int]] = {}
        """By layer, the requests of the pass under way."""
        self._pushes: dict[int, list[float]] = {}
        """By request, the sum of |push| / |H| and how many positions were steered."""

    def around(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of `rollout`, sampled under steering."""
        number = 0
        with edited_blocks(self.policy, self.edits()):
            for record in records:
                if "error" not in record:
                    total, count = self._pushes.pop(number, (0.0, 0))
                    push = total / count if count else None
                    record["rollout"] |= {"steer": self.notes, "push": push}
                    number += 1
                yield record

    def on_rows(self, requests: Sequence[int]) -> None:
        self._rows = dict.fromkeys(self._directions, requests)

    def edits(self) -> dict[int, Edit]:
        """What is done to the output of each layer."""
        return {layer: self._edit(layer) for layer in self._directions}

    def _edit(self, layer: int) -> Edit:
        def edit(output: Tensor, ids: Tensor) -> Tensor:
            where = self.places(ids)  # [B, T], N of them true
            before = output[where].to(self.dtype)  # [N, d]
            push, steered = torch.zeros_like(before), torch.zeros_like(before[:, 0]).bool()
            for one in self._directions[layer]:
                offset, here = one.offset(before, where)
                push, steered = push + offset, steered | here
            # The second pass of guidance is not announced: its rows have been popped.
            if (requests := self._rows.pop(layer, None)) is not None:
                share = push.norm(dim=1) / before.norm(dim=1).clamp(min=1e-30)
                self._note(requests, where, share, steered)
            changed = output.clone()
            changed[where] = (before + push).to(output.dtype)
            return changed

        return edit

    def _note(self, requests: Sequence[int], where: Tensor, share: Tensor, steered: Tensor) -> None:
        """Add |push| / |H| [N] of the steered positions, bool [N], to those of the requests."""
        row = where.nonzero()[:, 0][steered]  # [n]
        sums = share.new_zeros(len(requests), 2, dtype=torch.float64)
        values = share[steered].double()
        sums.index_add_(0, row, torch.stack([values, torch.ones_like(values)], dim=1))
        for request, (total, count) in zip(requests, sums.tolist(), strict=True):
            if request >= 0:
                entry = self._pushes.setdefault(request, [0.0, 0])
                entry[0] += total
                entry[1] += count

    def places(self, ids: Tensor) -> Tensor:
        """bool [B, T]: positions that may be steered in a pass over ids [B, T], -1 for padding."""
        where = ids >= 0
        if self.policy.mask_id is None:
            if self.steering.scope == "update":
                where[:, :-1] = False
            return where
        masked = ids == self.policy.mask_id
        if self.steering.scope == "update":
            where = masked
        if self.steering.time is not None:
            low, high = self.steering.time
            # Mask tokens in the prompt must not bring the share above 1.
            share = (masked.sum(dim=1).double() / self.gen_length).clamp(max=1)
            where = where & ((low < share) & (share <= high))[:, None]
        return where


class _Directions:
    """The steered features of one autoencoder at one layer."""

    def __init__(self, sae: TopKSae, steers: Sequence[SteeredFeature], steering: Steering) -> None:
        self.sae, self.strongest = sae, steering.scope == "topk"
        """Whether only the positions of each row are steered at which a feature is strongest."""
        self.by_norm = steering.unit == "norm"
        self.features = torch.tensor([s.feature for s in steers], device=sae.W_dec.device)
        amplitudes = sae.W_dec.new_tensor([steer.amplitude for steer in steers])
        directions = sae.W_dec[self.features]
        if self.by_norm:
            directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
        self.rows = amplitudes[:, None] * directions
        """[n, d]; summed to [1, d] if all features are steered at the same positions."""
        if not self.strongest:
            self.rows = self.rows.sum(dim=0, keepdim=True)

    def offset(self, x: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the N activations x [N, d] at the positions `where` bool [B, T].

        Returns:
            [N, d], and bool [N], which positions are steered.
        """
        weights = x.norm(dim=1, keepdim=True)  # [N, 1], m
        steered = torch.ones_like(weights, dtype=torch.bool)
        if self.strongest or not self.by_norm:
            scales, strengths = [], []
            for part in chunks(self.sae, x):
                pre = self.sae.pre_activations(part)  # [N, F]
                scales.append(self.sae.rectified(pre).amax(dim=1))
                strengths.append(pre[:, self.features])
            weights = weights if self.by_norm else torch.cat(scales)[:, None]
            if self.strongest:
                steered = _strongest(torch.cat(strengths), where)  # [N, n]
        return (weights * steered) @ self.rows, steered.any(dim=1)


def _strongest(strength: Tensor, where: Tensor) -> Tensor:
    """bool [N, n]: the positions of each row at which each feature is strongest.

    Args:
        strength: pre-activations [N, n] at the N positions that are true in `where` bool [B, T].
    """
    table = strength.new_full((*where.shape, strength.shape[1]), -torch.inf)  # [B, T, n]
    table[where] = strength
    top = table.topk(min(STRONGEST, table.shape[1]), dim=1).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True)[where]


def _check(policy: Policy, sampler: SamplerConfig, steering: Steering) -> None:
    if sampler.compile:
        raise UsageError("--compile and --steer do not go together: leave one out")
    if steering.time is not None and not policy.diffusion:
        raise UsageError(f"--steer-time means nothing to {policy.name}, an autoregressive model")
    if steering.time is not None and policy.blocks is not None:
        raise UsageError(
            f"--steer-time counts what is masked in the whole completion, and {policy.name} passes "
            "over it block by block"
        )
    if steering.time is not None and sampler.cache == "dual":
        raise UsageError(
            "--steer-time counts what is masked, and with --cache dual a pass sees the block "
            "alone: use --cache prefix"
        )
    if sampler.cfg_scale > 0 and (steering.time is not None or steering.scope == "update"):
        raise UsageError(
            "--cfg-scale hides the prompt in every second pass, so that --steer-scope update and "
            "--steer-time cannot tell what is still masked: leave it out"
        )
