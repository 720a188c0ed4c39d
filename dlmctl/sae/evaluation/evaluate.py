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
from dlmctl.settings.sae import Insertion


class PlacedSae(NamedTuple):
    """An autoencoder and the activations it is for."""

    name: str
    sae: TopKSae
    layer: int
    positions: Positions

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


class Evaluation:
    """Measures of autoencoders on one policy, summed over batches."""

    def __init__(self, policy: Policy, saes: Sequence[PlacedSae], insertion: Insertion) -> None:
        self.policy, self.saes, self.insertion = policy, saes, insertion
        self.measures = [Reconstruction(placed.sae) for placed in saes]
        self.changes = [Changes() for _ in saes]
        self.losses = {False: Losses(), True: Losses()}
        """Of the model as it is, on masked and (True) on clean text."""

    @torch.no_grad()
    def add(self, batch: MaskedBatch) -> list[Codes]:
        """Take in a batch; returns the codes of each autoencoder at the positions it is for."""
        codes: dict[int, Codes] = {}
        for clean in (False, True):
            numbers = [n for n, s in enumerate(self.saes) if (s.positions == "clean") == clean]
            if not numbers:
                continue
            view = batch.clean() if clean else batch
            outputs: dict[int, Tensor] = {}  # by layer
            edits = {self.saes[n].layer: _keep(outputs, self.saes[n].layer) for n in numbers}
            before = document_losses(self.policy, view, edits)
            self.losses[clean].add(before)
            for n in numbers:
                codes[n] = self._add_to(n, view, outputs[self.saes[n].layer], before)
        return [codes[n] for n in range(len(self.saes))]

    def _add_to(
        self, number: int, batch: MaskedBatch, output: Tensor, before: DocumentLosses
    ) -> Codes:
        """Take in a batch for one autoencoder, `output` [B, T, d] being that of its block."""
        _, sae, layer, positions = self.saes[number]
        x = output[batch.selected(positions)].to(sae.W_enc.dtype)  # [N, d]
        codes = sae.encode(x)
        self.measures[number].add(x, sae.decode(codes), codes)
        if self.insertion.insert:
            edit = splice(self.policy, sae, positions, self.insertion.scope)
            self.changes[number].add(before, document_losses(self.policy, batch, {layer: edit}))
        return codes

    def row(self, number: int) -> dict[str, Any]:
        """The measures of an autoencoder; raises DataError if no token was of its kind."""
        positions = self.saes[number].positions
        if not self.measures[number].tokens:
            raise DataError(f"the corpus has no token at positions {positions}")
        losses = self.losses[positions == "clean"].means()
        return {
            **self.measures[number].row(),
            **{f"loss_{name}": value for name, value in losses.items()},
            **(self.changes[number].row() if self.insertion.insert else {}),
        }


def evaluate(
    policy: Policy,
    batches: Iterable[MaskedBatch],
    saes: Sequence[PlacedSae],
    insertion: Insertion,
    corpus: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A record for each autoencoder.

    Args:
        corpus: what each record says about the corpus.

    Raises:
        DataError: the corpus has no token of the kind that an autoencoder is for.
    """
    evaluation = Evaluation(policy, saes, insertion)
    for batch in batches:
        evaluation.add(batch)
    about: dict[str, Any] = {"model": policy.name, **corpus}
    if insertion.insert:
        about |= {"scope": insertion.scope, "logit_shift": policy.shift}
    return [{**placed.about, **about, **evaluation.row(n)} for n, placed in enumerate(saes)]


def _keep(outputs: dict[int, Tensor], layer: int) -> Edit:
    """An edit that changes nothing and keeps the output of a block."""

    def keep(output: Tensor, _: Tensor) -> Tensor:
        outputs[layer] = output
        return output

    return keep
