"""Sources of activations for a training run: a model over a corpus, or a directory.

A source has activations of some layers and positions, in blocks (one per batch of the corpus):

    keys, width, device   which activations, their width, and where they are
    dtype                 of the activations
    settings              everything that determines them; a resumed run must have the same
    blocks(start)         from block `start` on; all ranks call this, each gets what it trains on
    metadata(key)         what the folder of an autoencoder says about model and masks
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dlmctl.models.blocks import block_name
from dlmctl.models.policy import Policy
from dlmctl.sae.activations import (
    ActivationBatch,
    Key,
    StoredActivations,
    check_keys,
    model_activations,
    source_metadata,
)
from dlmctl.sae.corpus import CorpusPlan, Document, MaskedBatch, Positions, mask_batch
from dlmctl.sae.training.division import Takers, own_batches, shared_out
from dlmctl.train.distributed import rank


class ModelSource:
    """A model over a corpus."""

    def __init__(
        self,
        policy: Policy,
        windows: Callable[[], Iterator[list[Document]]],
        layers: Sequence[int],
        positions: Sequence[Positions],
        plan: CorpusPlan,
    ) -> None:
        """Args:
            windows: makes the documents of each batch, from the first batch on.

        Raises:
            UsageError: the model has no such layer, or masks nothing.
        """
        check_keys(policy, layers, positions)
        self.policy, self._windows, self._law = policy, windows, plan.law
        self._layers, self._positions = layers, positions
        self._metadata = source_metadata(policy, plan)
        self.keys: Sequence[Key] = [Key(layer, kind) for layer in layers for kind in positions]
        self.width = policy.width
        self.device = policy.device
        self.dtype = next(policy.model.parameters()).dtype
        about = {name.removeprefix("dlm_"): value for name, value in self._metadata.items()}
        self.settings: Mapping[str, Any] = {**about, "seed": plan.law.seed}

    def blocks(self, start: int, takers: Takers | None = None) -> Iterator[ActivationBatch]:
        def make(window: list[Document], number: int) -> MaskedBatch:
            return mask_batch(window, self.policy, self._law, number)

        for batch, count in own_batches(self._windows(), make, start):
            [rows] = model_activations(self.policy, [batch], self._layers, self._positions)
            yield from shared_out(rows, count, takers or {})

    def metadata(self, key: Key) -> dict[str, Any]:
        return _with_key(self._metadata, block_name(self.policy, key.layer), key)


def _with_key(metadata: Mapping[str, Any], hook: str, key: Key) -> dict[str, Any]:
    return {
        **metadata,
        "hook_name": hook,
        "dlm_layer": key.layer,
        "dlm_positions": key.positions,
    }


class StoredSource:
    """A directory of `dlmctl sae-activations`."""

    def __init__(
        self,
        directory: Path,
        layers: Sequence[int] | None,
        positions: Sequence[Positions] | None,
        device: torch.device,
    ) -> None:
        """Layers and positions that are None are all that it contains.

        Raises:
            MissingInputError: there is no such directory.
            UsageError: it does not contain these.
        """
        self.stored = StoredActivations(directory)
        self.keys: Sequence[Key] = [
            Key(layer, kind)
            for layer in layers or self.stored.index["layers"]
            for kind in positions or self.stored.index["positions"]
        ]
        self.stored.check(self.keys)
        self.width = int(self.stored.index["width"])
        self.device = device
        first = next(self.stored.blocks(self.keys[:1], "cpu"), {})
        self.dtype = next((rows.dtype for rows in first.values()), torch.float32)
        self.settings: Mapping[str, Any] = self.stored.metadata

    def blocks(self, start: int, takers: Takers | None = None) -> Iterator[ActivationBatch]:
        own = [key for key in self.keys if takers is None or rank() in takers[key]]
        return self.stored.blocks(own, self.device, start)

    def metadata(self, key: Key) -> dict[str, Any]:
        return _with_key(self.stored.metadata, self.stored.index["hooks"][str(key.layer)], key)


Source = ModelSource | StoredSource
