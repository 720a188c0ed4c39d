"""Evaluation of autoencoders on a model: reconstruction, and the loss on insertion."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from dlmctl.models.blocks import Edit
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError
from dlmctl.sae.activations import check_keys
from dlmctl.sae.corpus import MaskedBatch, Positions
from dlmctl.sae.evaluation.insertion import (
    Changes,
    DocumentLosses,
    Losses,
    document_losses,
    splice,
)
from dlmctl.sae.formats.folders import SavedSae
from dlmctl.sae.measures import Reconstruction
from dlmctl.sae.topk import Codes, TopKSae
from dlmctl.settings.sae import Scope


class Placed(NamedTuple):
    """An autoencoder and where it belongs."""

    name: str
    sae: TopKSae
    layer: int
    positions: Positions
    saved: SavedSae

    @property
    def about(self) -> dict[str, Any]:
        """As it stands in a record."""
        return {
            "sae": self.name,
            "layer": self.layer,
            "k": self.sae.k,
            "positions": self.positions,
            "latents": self.sae.d_sae,
        }


def place(name: str, saved: SavedSae, policy: Policy, layer: int | None = None) -> Placed:
    """An autoencoder on the device of a policy.

    Args:
        layer: block whose output it is for; None: as its folder says.

    Raises:
        UsageError: the policy has no such layer.
        DataError: it does not say what it is for, or is for activations of another width.
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
    return Placed(name, saved.sae.to(policy.device), int(layer), positions, saved)


class Evaluation:
    """Measures of autoencoders on one policy, summed over batches."""

    def __init__(self, policy: Policy, saes: Sequence[Placed], scope: Scope, insert: bool) -> None:
        """Args:
        insert: take the loss on insertion too, a pass for each autoencoder.
        """
        self.policy, self.saes, self.scope, self.insert = policy, saes, scope, insert
        self.measures = [Reconstruction(placed.sae) for placed in saes]
        self.changes = [Changes() for _ in saes]
        self.clean = {False: Losses(), True: Losses()}
        """By whether it is text of which nothing is hidden."""

    @torch.no_grad()
    def add(self, batch: MaskedBatch) -> list[Codes]:
        """Take in a batch; returns the codes of each autoencoder at its own positions."""
        codes: list[Codes] = [None] * len(self.saes)  # type: ignore[list-item]
        for bare in (False, True):
            mine = [n for n, s in enumerate(self.saes) if (s.positions == "clean") == bare]
            if not mine:
                continue
            view = batch.clean() if bare else batch
            outputs: dict[int, Tensor] = {}
            look = {self.saes[n].layer: _keep(outputs, self.saes[n].layer) for n in mine}
            before = document_losses(self.policy, view, look)
            self.clean[bare].add(before)
            for n in mine:
                codes[n] = self._count(n, view, outputs[self.saes[n].layer], before)
        return codes

    def _count(
        self, number: int, batch: MaskedBatch, output: Tensor, before: DocumentLosses
    ) -> Codes:
        placed = self.saes[number]
        x = output[batch.selected(placed.positions)].to(placed.sae.W_enc.dtype)
        codes = placed.sae.encode(x)
        self.measures[number].add(x, placed.sae.decode(codes), codes)
        if self.insert:
            edit = splice(self.policy, placed.sae, placed.positions, self.scope)
            after = document_losses(self.policy, batch, {placed.layer: edit})
            self.changes[number].add(before, after)
        return codes

    def row(self, number: int) -> dict[str, Any]:
        """The measures of an autoencoder; raises DataError where no token was of its kind."""
        positions = self.saes[number].positions
        if not self.measures[number].tokens:
            raise DataError(f"the corpus has no token at positions {positions}")
        found: dict[str, Any] = self.measures[number].row()
        clean = self.clean[positions == "clean"]
        found |= {f"loss_{name}": value for name, value in clean.means().items()}
        if self.insert:
            found |= self.changes[number].row()
        return found


def evaluate(
    policy: Policy,
    batches: Iterable[MaskedBatch],
    saes: Sequence[Placed],
    scope: Scope,
    insert: bool,
    corpus: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A record for each autoencoder.

    Args:
        corpus: what is said of it in each record.

    Raises:
        DataError: the corpus has no token of the kind that one of them is for.
    """
    evaluation = Evaluation(policy, saes, scope, insert)
    for batch in batches:
        evaluation.add(batch)
    rows = []
    for number, placed in enumerate(saes):
        about: dict[str, Any] = {"model": policy.name, **corpus}
        if insert:
            about |= {"scope": scope, "logit_shift": policy.shift}
        rows.append({**placed.about, **about, **evaluation.row(number)})
    return rows


def _keep(outputs: dict[int, Tensor], layer: int) -> Edit:
    def look(output: Tensor, _: Tensor) -> Tensor:
        outputs[layer] = output
        return output

    return look
