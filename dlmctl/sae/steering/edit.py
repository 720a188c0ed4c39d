"""Steering: directions of a dictionary added to the residual stream while completions are sampled.

    H'[b,t] = H[b,t] + amplitude * m[b,t] * W_dec[f]          m[b,t] = max_j z_j(H[b,t])

H is the output of a block and z its code (DLM-Scope, arXiv 2602.05859, equations 13 and 14; the
scale m is that of its code). As decoding is affine, this is what adding amplitude * m to latent f
of the code comes to, where the part of H that the dictionary does not explain is kept. Several
features of a dictionary share one code, and those of two dictionaries at a layer see the same H.

Steered are the positions of each forward pass. With a key-value cache these are the block and what
follows (prefix), or the block alone (dual), and the whole sequence where the cache is renewed; an
autoregressive model passes over the prompt once, and then over the newest token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dlmctl.diffusion.sampling import SamplerConfig
from dlmctl.models.blocks import Edit, check_layers, edited_blocks
from dlmctl.models.policy import Policy
from dlmctl.records.errors import UsageError
from dlmctl.records.jsonl import Record
from dlmctl.sae.fitting import check_width, computing_dtype
from dlmctl.sae.formats.folders import read_sae
from dlmctl.sae.topk import TopKSae

Scope = Literal["all", "update", "topk"]

STRONGEST = 3
"""Positions of a row that the scope `topk` steers, as in DLM-Scope's code."""

CODE_SIZE = 1 << 26
"""Numbers in the codes that are made at a time."""


class Steer(NamedTuple):
    """A feature and how far to go in its direction."""

    sae: str
    """Folder of the dictionary."""
    layer: int | None
    """Block whose output is changed; None is the one that the folder names."""
    feature: int
    amplitude: float


@dataclass(frozen=True)
class Reach:
    """Where and when a completion is steered."""

    scope: Scope = "all"
    """All positions; those still masked, of an autoregressive model the newest; or the positions of
    each row at which the feature's pre-activation is largest."""
    time: tuple[float, float] | None = None
    """Only while the share of the completion that is masked is above the first and not above the
    second, so that adjoining ranges have no step in common; None is always."""

    def __post_init__(self) -> None:
        if self.time is not None and not 0 <= self.time[0] < self.time[1] <= 1:
            raise UsageError("--steer-time is LO-HI with 0 <= LO < HI <= 1")


def parse_steer(text: str) -> Steer:
    """`SAE[@LAYER]:FEATURE=AMPLITUDE`; raises UsageError."""
    found = re.fullmatch(r"(.+?)(?:@(\d+))?:(\d+)=([^=]+)", text)
    try:
        if found is None:
            raise ValueError
        sae, layer, feature, amplitude = found.groups()
        return Steer(sae, None if layer is None else int(layer), int(feature), float(amplitude))
    except ValueError:
        raise UsageError(f"--steer {text} is not SAE[@LAYER]:FEATURE=AMPLITUDE") from None


def parse_time(text: str) -> tuple[float, float]:
    """`LO-HI`; raises UsageError."""
    low, _, high = text.partition("-")
    try:
        return float(low), float(high)
    except ValueError:
        raise UsageError(f"--steer-time {text} is not LO-HI, as 0.5-1") from None


class Steering:
    """A policy steered, and the records that tell of it.

    Raises:
        MissingInputError, DataError: a dictionary cannot be read.
        UsageError: it does not fit the policy, or the settings do not go with steering.
    """

    def __init__(
        self, policy: Policy, settings: SamplerConfig, steers: Sequence[Steer], reach: Reach
    ) -> None:
        _check(policy, settings, reach)
        self.policy, self.reach, self.gen_length = policy, reach, settings.gen_length
        saved = {steer.sae: read_sae(Path(steer.sae)) for steer in steers}
        steers = [
            steer._replace(layer=_layer(steer, saved[steer.sae].metadata)) for steer in steers
        ]
        check_layers(policy, [steer.layer for steer in steers if steer.layer is not None])
        if len({steer[:3] for steer in steers}) < len(steers):
            raise UsageError("--steer names a feature twice")
        self.dtype = computing_dtype(policy)
        self.pushes: dict[int, list[_Push]] = {}
        for (name, layer), group in _grouped(steers).items():
            check_width(name, saved[name].sae, policy)
            _check_features(name, saved[name].sae, group)
            sae = saved[name].sae.to(policy.device, self.dtype)
            self.pushes.setdefault(layer, []).append(_Push(sae, group, reach.scope))
        time = None if reach.time is None else list(reach.time)
        self.notes: list[dict[str, Any]] = [
            {**steer._asdict(), "scope": reach.scope, "time": time} for steer in steers
        ]
        """What stands in `rollout.steer`."""

    def around(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of `rollout`, sampled under steering."""
        with edited_blocks(self.policy, self.edits()):
            for record in records:
                if "error" not in record:
                    record["rollout"]["steer"] = self.notes
                yield record

    def edits(self) -> dict[int, Edit]:
        """What is done to the output of each layer."""
        return {layer: self._edit(pushes) for layer, pushes in self.pushes.items()}

    def _edit(self, pushes: Sequence[_Push]) -> Edit:
        def edit(output: Tensor, ids: Tensor) -> Tensor:
            where = self.places(ids)
            before = output[where].to(self.dtype)
            after = before
            for push in pushes:
                after = after + push.offset(before, where)
            changed = output.clone()
            changed[where] = after.to(output.dtype)
            return changed

        return edit

    def places(self, ids: Tensor) -> Tensor:
        """bool [B, T], what may be steered of a pass over ids [B, T], -1 for padding."""
        where = ids >= 0
        if self.policy.mask_id is None:
            if self.reach.scope == "update":
                where[:, :-1] = False
            return where
        masked = ids == self.policy.mask_id
        if self.reach.scope == "update":
            where = masked
        if self.reach.time is not None:
            low, high = self.reach.time
            # A prompt that holds mask tokens does not make it more than all.
            share = (masked.sum(dim=1).double() / self.gen_length).clamp(max=1)
            where = where & ((low < share) & (share <= high))[:, None]
        return where


class _Push:
    """The features of one dictionary at one layer."""

    def __init__(self, sae: TopKSae, steers: Sequence[Steer], scope: Scope) -> None:
        self.sae = sae.requires_grad_(False)
        features = [steer.feature for steer in steers]
        self.features = torch.tensor(features, device=sae.W_dec.device)
        amplitudes = sae.W_dec.new_tensor([steer.amplitude for steer in steers])
        self.directions = amplitudes[:, None] * sae.W_dec[self.features]
        """[n, d]; one row for all features where they are steered at the same positions."""
        self.strongest = scope == "topk"
        if not self.strongest:
            self.directions = self.directions.sum(dim=0, keepdim=True)

    def offset(self, x: Tensor, where: Tensor) -> Tensor:
        """What is added to the N activations x [N, d] at the positions `where` bool [B, T]."""
        scale, strength = self._code(x)
        weights = scale[:, None]
        if self.strongest:
            weights = weights * _strongest(strength, where)
        return weights @ self.directions

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """m [N], the largest entry of the code, and the features' pre-activations [N, n]."""
        scales, strengths = [], []
        for part in x.split(max(1, CODE_SIZE // self.sae.d_sae)):
            pre = self.sae.pre_activations(part)
            scales.append(pre.amax(dim=1).relu())
            strengths.append(pre[:, self.features])
        return torch.cat(scales), torch.cat(strengths)


def _strongest(strength: Tensor, where: Tensor) -> Tensor:
    """bool [N, n]: the positions of each row at which each feature is strongest.

    Args:
        strength: [N, n], for the N positions that are true in `where` bool [B, T].
    """
    table = strength.new_full((*where.shape, strength.shape[1]), -torch.inf)
    table[where] = strength
    top = table.topk(min(STRONGEST, table.shape[1]), dim=1).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True)[where]


def _check(policy: Policy, settings: SamplerConfig, reach: Reach) -> None:
    if settings.compile:
        raise UsageError("--compile and --steer do not go together: leave one out")
    if reach.time is not None and not policy.diffusion:
        raise UsageError(f"--steer-time means nothing to {policy.name}, an autoregressive model")
    if reach.time is not None and settings.cache == "dual":
        raise UsageError(
            "--steer-time counts what is masked, and with --cache dual a pass sees the block "
            "alone: use --cache prefix"
        )
    if settings.cfg_scale > 0 and (reach.time is not None or reach.scope == "update"):
        raise UsageError(
            "--cfg-scale hides the prompt in every second pass, so that --steer-scope update and "
            "--steer-time cannot tell what is still masked: leave it out"
        )


def _layer(steer: Steer, metadata: Mapping[str, Any]) -> int:
    if steer.layer is not None:
        return steer.layer
    layer = metadata.get("dlm_layer")
    if not isinstance(layer, int):
        raise UsageError(
            f"{steer.sae} does not say which layer it is of (dlm_layer): write "
            f"--steer {steer.sae}@LAYER:{steer.feature}={steer.amplitude:g}"
        )
    return layer


def _grouped(steers: Sequence[Steer]) -> dict[tuple[str, int], list[Steer]]:
    groups: dict[tuple[str, int], list[Steer]] = {}
    for steer in steers:
        assert steer.layer is not None
        groups.setdefault((steer.sae, steer.layer), []).append(steer)
    return groups


def _check_features(name: str, sae: TopKSae, steers: Sequence[Steer]) -> None:
    for steer in steers:
        if steer.feature >= sae.d_sae:
            raise UsageError(f"{name} has latents 0 to {sae.d_sae - 1}, and no {steer.feature}")
