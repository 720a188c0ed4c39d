"""Steering: directions of features added to the residual stream while completions are sampled.

    H'[b,t] = H[b,t] + amplitude * m[b,t] * W_dec[f]          m[b,t] = max_j z_j(H[b,t])

H is the output of a block and z its code (DLM-Scope, arXiv 2602.05859, equations 13 and 14; the
scale m is that of its code). As decoding is affine, this equals adding amplitude * m to latent f of
the code while keeping the part of H that the autoencoder does not explain. Several features of an
autoencoder share one code, and those of two autoencoders at a layer see the same H.

Steering applies to the positions of each forward pass. With a key-value cache these are the block
and what follows it (prefix), or the block alone (dual), and the whole sequence when the cache is
renewed; an autoregressive model passes over the prompt once, and then over the newest token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import Edit, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.steering.sae_at_layer import SaeAtLayer, computing_dtype, read_at_layer
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.steering import SteeredFeature, Steering

STRONGEST = 3
"""Positions of a row that the scope `topk` steers, as in DLM-Scope's code."""
CODE_SIZE = 1 << 26
"""Numbers in the codes that are computed at a time."""


class SteeredPolicy:
    """A policy steered by features, and what the records say of it.

    Raises:
        MissingInputError, DataError: an autoencoder cannot be read.
        UsageError: it does not fit the policy, or the sampler's options do not go with steering.
    """

    def __init__(self, policy: Policy, sampler: SamplerConfig, steering: Steering) -> None:
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
            note = {**steer._asdict(), "layer": layer, "scope": steering.scope, "time": time}
            self.notes.append(note)
        self._directions: dict[int, list[_Directions]] = {}
        for (_, layer), (sae, steers) in groups.items():
            at_layer = self._directions.setdefault(layer, [])
            at_layer.append(_Directions(sae, steers, steering.scope == "topk"))

    def around(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of `rollout`, sampled under steering."""
        with edited_blocks(self.policy, self.edits()):
            for record in records:
                if "error" not in record:
                    record["rollout"]["steer"] = self.notes
                yield record

    def edits(self) -> dict[int, Edit]:
        """What is done to the output of each layer."""
        return {layer: self._edit(directions) for layer, directions in self._directions.items()}

    def _edit(self, directions: Sequence[_Directions]) -> Edit:
        def edit(output: Tensor, ids: Tensor) -> Tensor:
            where = self.places(ids)  # [B, T], N of them true
            before = output[where].to(self.dtype)  # [N, d]
            after = before
            for one in directions:
                after = after + one.offset(before, where)
            changed = output.clone()
            changed[where] = after.to(output.dtype)
            return changed

        return edit

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

    def __init__(self, sae: TopKSae, steers: Sequence[SteeredFeature], strongest: bool) -> None:
        """`strongest`: steer only the positions of each row at which a feature is strongest."""
        self.sae, self.strongest = sae, strongest
        self.features = torch.tensor([s.feature for s in steers], device=sae.W_dec.device)
        amplitudes = sae.W_dec.new_tensor([steer.amplitude for steer in steers])
        self.rows = amplitudes[:, None] * sae.W_dec[self.features]
        """[n, d]; summed to [1, d] if all features are steered at the same positions."""
        if not strongest:
            self.rows = self.rows.sum(dim=0, keepdim=True)

    def offset(self, x: Tensor, where: Tensor) -> Tensor:
        """What is added to the N activations x [N, d] at the positions `where` bool [B, T]."""
        scales, strengths = [], []
        for part in x.split(max(1, CODE_SIZE // self.sae.d_sae)):
            pre = self.sae.pre_activations(part)  # [N, F]
            scales.append(self.sae.rectified(pre).amax(dim=1))
            strengths.append(pre[:, self.features])
        weights = torch.cat(scales)[:, None]  # [N, 1], m
        if self.strongest:
            weights = weights * _strongest(torch.cat(strengths), where)  # [N, n]
        return weights @ self.rows


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
