"""Autoencoders and the activations they are for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.sae.activations import check_keys
from dlmctl.sae.corpus import Positions
from dlmctl.sae.formats.folders import SavedSae
from dlmctl.sae.topk import TopKSae
from dlmctl.settings.sae import Insertion


class PlacedSae(NamedTuple):
    """An autoencoder and the activations it is for."""

    name: str
    sae: TopKSae
    layer: int
    positions: Positions
    partner: PlacedSae | None = None
    """One for visible tokens that stands in together with this one, which is for masked ones."""

    @property
    def parts(self) -> list[PlacedSae]:
        """The autoencoder, or both."""
        return [self] if self.partner is None else [self, self.partner]

    @property
    def about(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {
            "sae": "+".join(part.name for part in self.parts),
            "layer": self.layer,
            "k": self.sae.k,
            "positions": self.positions if self.partner is None else "both",
            "latents": self.latents,
        }

    @property
    def latents(self) -> int:
        """Of both together."""
        return sum(part.sae.d_sae for part in self.parts)

    @property
    def decoder(self) -> Tensor:
        """[F, d], the rows of both."""
        return torch.cat([part.sae.W_dec.detach() for part in self.parts])


def place_sae(name: str, saved: SavedSae, policy: Policy, layer: int | None = None) -> PlacedSae:
    """An autoencoder on the device of a policy.

    Args:
        layer: block whose output it is for; None: as its folder says.

    Raises:
        UsageError: the policy has no such layer.
        DataError: the folder does not say what it is for, or it is for another width.
    """
    layer = saved.metadata.get("dlm_layer") if layer is None else layer
    if layer is None:
        raise DataError("it does not say which layer it is for (dlm_layer)", name)
    positions: Positions = saved.metadata.get("dlm_positions") or (
        "mask" if policy.diffusion else "all"
    )
    if positions not in get_args(Positions):
        raise DataError(f"it is for positions '{positions}', a kind not known here", name)
    check_keys(policy, [layer], [positions])
    if saved.sae.d_in != policy.width:
        raise DataError(
            f"it is for activations of width {saved.sae.d_in}, {policy.name} has {policy.width}",
            name,
        )
    return PlacedSae(name, saved.sae.to(policy.device), int(layer), positions)


def as_inserted(saes: Sequence[PlacedSae], insertion: Insertion) -> Sequence[PlacedSae]:
    """Autoencoders as they stand in: one by one, or, with scope `both`, in pairs."""
    return _pairs(saes) if insertion.insert and insertion.scope == "both" else saes


def _pairs(saes: Sequence[PlacedSae]) -> list[PlacedSae]:
    """Autoencoders of masked tokens, each with its partner of visible ones.

    Partners have the same directory, layer, K and number of latents.

    Raises:
        UsageError: one has no partner, or several.
    """
    groups: dict[Any, list[PlacedSae]] = {}
    for one in saes:
        key = Path(one.name).parent, one.layer, one.sae.k, one.sae.d_sae
        groups.setdefault(key, []).append(one)
    found = []
    for group in groups.values():
        by_kind = {one.positions: one for one in group}
        if len(group) != 2 or set(by_kind) != {"mask", "unmask"}:
            raise UsageError(
                "--scope both takes an autoencoder of masked and one of visible tokens for each "
                "layer and K of a directory, and not only "
                + ", ".join(f"{one.name} ({one.positions})" for one in group)
            )
        found.append(by_kind["mask"]._replace(partner=by_kind["unmask"]))
    return found
