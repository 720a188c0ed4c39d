"""Where the activations of a training run come from: a model over a corpus, or a directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from dlmctl.models.blocks import block_name
from dlmctl.models.policy import Policy
from dlmctl.sae.activations import (
    Block,
    Key,
    StoredActivations,
    check_keys,
    model_activations,
    source_metadata,
)
from dlmctl.sae.corpus import Batch, Corruption, Document, Positions, corrupted_batch
from dlmctl.sae.training.division import Takers, own_batches, shared_out
from dlmctl.train.distributed import rank


class Source(Protocol):
    """Activations of some layers and positions, from any block on."""

    keys: Sequence[Key]
    width: int
    """Of an activation."""
    device: torch.device
    settings: Mapping[str, Any]
    """What decides what the activations are."""

    def blocks(self, start: int, takers: Takers | None = None) -> Iterator[Block]:
        """From block `start` on; of several ranks all call this, and each has what it takes."""

    def metadata(self, key: Key) -> dict[str, Any]:
        """What a SAE's folder says of the model and the masks."""


class ModelSource:
    """A model over a corpus."""

    def __init__(
        self,
        policy: Policy,
        windows: Callable[[], Iterator[list[Document]]],
        layers: Sequence[int],
        positions: Sequence[Positions],
        law: Corruption,
        about: Mapping[str, Any],
    ) -> None:
        """Args:
            windows: makes the documents of each batch, from the first on.
            about: other settings of the corpus, the length of the context for one.

        Raises:
            UsageError: the model has no such layer, or hides nothing.
        """
        check_keys(policy, layers, positions)
        self.policy, self._windows, self._law = policy, windows, law
        self._layers, self._positions, self._about = layers, positions, about
        self._model = source_metadata(policy, law)
        self.keys: Sequence[Key] = [Key(layer, kind) for layer in layers for kind in positions]
        self.width = policy.width
        self.device = policy.device
        self.settings: Mapping[str, Any] = {**self._model, **about, "seed": law.seed}

    def blocks(self, start: int, takers: Takers | None = None) -> Iterator[Block]:
        def make(window: list[Document], number: int) -> Batch:
            return corrupted_batch(window, self.policy, self._law, number)

        for batch, count in own_batches(self._windows(), make, start):
            [rows] = model_activations(self.policy, [batch], self._layers, self._positions)
            yield from shared_out(rows, count, takers or {})

    def metadata(self, key: Key) -> dict[str, Any]:
        return {
            **self._model,
            **{f"dlm_{name}": value for name, value in self._about.items() if name != "context"},
            "context_size": self._about["context"],
            "hook_name": block_name(self.policy, key.layer),
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
        """Layers and positions that are not given are all that it holds.

        Raises:
            MissingInputError: there is no such directory.
            UsageError: it does not hold these.
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
        self.settings: Mapping[str, Any] = self.stored.metadata

    def blocks(self, start: int, takers: Takers | None = None) -> Iterator[Block]:
        own = [key for key in self.keys if takers is None or rank() in takers[key]]
        return self.stored.blocks(own, self.device, start)

    def metadata(self, key: Key) -> dict[str, Any]:
        return {
            **self.stored.metadata,
            "hook_name": self.stored.index["hooks"][str(key.layer)],
            "dlm_layer": key.layer,
            "dlm_positions": key.positions,
        }
