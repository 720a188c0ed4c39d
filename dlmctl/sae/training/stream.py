"""Training of the autoencoders for one layer and kind of positions, which share a buffer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.noise import stream_key
from dlmctl.models.sending import sent
from dlmctl.sae.activations import Key
from dlmctl.sae.formats.folders import SavedSae
from dlmctl.sae.training.buffer import ShuffleBuffer
from dlmctl.sae.training.trainer import SaeTrainer, empty_sae
from dlmctl.settings.sae import SaeRecipe
from dlmctl.train.distributed import rank, send_to_first

FIRST = 65_536
"""Activations that decide the first weights, at most."""
PART = 16_384
"""Activations whose norms are computed at once."""


class Stream:
    """A shuffle buffer of one kind of activations, and a trainer for each K that draws from it.

    The order of events, on which reproducibility rests:

    1. `add` appends rows to the buffer, at most `wanted` of them over the whole run.
    2. `train` waits until the buffer is full and draws batches while half of it would remain, so
       that they are well mixed; at the end it draws all that are left.
    3. The first draw waits for `_begin`, which looks at the rows in the buffer: it decides the norm
       limit of `drop_norms` and the first weights of each trainer.
    """

    def __init__(
        self,
        key: Key,
        ks: Sequence[int],
        recipe: SaeRecipe,
        width: int,
        buffer_rows: int,
        drop_norms: float | None,
        device: torch.device | str,
        owners: Mapping[int, int] | None = None,
        on_host: bool = False,
    ) -> None:
        """Args:
        ks: of its autoencoders.
        buffer_rows: of its buffer.
        drop_norms: leave out activations whose norm is above this many times the median.
        owners: the rank that trains each K; None: this one. A rank that trains none needs no
            buffer.
        on_host: whether the buffer is in the memory of the host. The results are the same.
        """
        seed = stream_key(recipe.seed, "sae", key.layer, key.positions)
        self.key, self.recipe, self.drop_norms = key, recipe, drop_norms
        self.buffer = ShuffleBuffer(recipe.buffer_capacity(buffer_rows), seed, on_host)
        self.device = torch.device(device)
        self.ks, self.width = ks, width
        self.owners = owners or dict.fromkeys(ks, rank())
        own = [k for k in ks if self.owners[k] == rank()]
        self.trainers = {k: SaeTrainer(recipe, width, k, seed, device) for k in own}
        self.limit: float | None = None
        """Norm above which activations are left out."""
        self.began = False

    @property
    def finished(self) -> bool:
        return all(trainer.finished for trainer in self.trainers.values())

    @property
    def wanted(self) -> int:
        """Number of activations that are still to come in."""
        if not self.trainers:
            return 0
        trained = next(iter(self.trainers.values())).tokens
        return self.recipe.steps * self.recipe.batch_size - trained - len(self.buffer)

    def add(self, rows: Tensor) -> None:
        """Take in activations [N, d], as many as are wanted."""
        if self.limit is not None:
            rows = rows[rows.float().norm(dim=1) <= self.limit]
        self.buffer.add(rows[: self.wanted])

    def train(self, last: bool = False, log_every: int = 1) -> Iterator[dict[str, Any]]:
        """Train on what is in the buffer, if it is full; on all of it if it was the `last`.

        Yields the metrics of each autoencoder's first step and of every `log_every`-th.
        """
        size, capacity = self.recipe.batch_size, self.buffer.capacity
        if not last and len(self.buffer) < capacity:
            return
        reserve = 0 if last else capacity // 2
        while not self.finished and len(self.buffer) >= reserve + size:
            if not self.began:
                self._begin()  # may drop rows, so look again whether there are enough
                continue
            x = self.buffer.draw(size)  # [batch_size, d], the same for every K
            for k, trainer in self.trainers.items():
                measured = trainer.step == 0 or (trainer.step + 1) % log_every == 0
                metrics = trainer.train_step(x, measured)
                if measured:
                    about = {"layer": self.key.layer, "k": k, "positions": self.key.positions}
                    yield about | metrics

    def _begin(self) -> None:
        if self.drop_norms is not None:
            parts = (sent(part, self.device) for part in self.buffer.rows.split(PART))
            norms = torch.cat([part.float().norm(dim=1) for part in parts])  # [N]
            self.limit = self.drop_norms * float(norms.median())
            self.buffer.keep(norms <= self.limit)
        for trainer in self.trainers.values():
            trainer.begin(self.buffer.first(FIRST))
        self.began = True

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on: `buffer/…`, `k50/…`, `began`, `limit`."""
        parts = {"buffer": self.buffer.state()}
        parts |= {f"k{k}": trainer.state() for k, trainer in self.trainers.items()}
        tensors = {f"{name}/{key}": t for name, part in parts.items() for key, t in part.items()}
        limit = torch.nan if self.limit is None else self.limit
        return {"began": torch.tensor(self.began), "limit": torch.tensor(limit), **tensors}

    def whole_state(self) -> dict[str, Tensor]:
        """The state on the first rank, including what other ranks train; all ranks call this."""
        parts = [send_to_first(owner, self.state) for owner in dict.fromkeys(self.owners.values())]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def saved(self, k: int, about: Mapping[str, Any]) -> SavedSae | None:
        """The trained autoencoder of this K, on the first rank; all ranks call this.

        Args:
            about: its metadata.
        """

        def tensors() -> dict[str, Tensor]:
            saved = self.trainers[k].saved(about)
            rates = {} if saved.firing_rate is None else {"rates": saved.firing_rate}
            return {**saved.sae.state_dict(), **rates}

        weights = send_to_first(self.owners[k], tensors)
        if not weights:
            return None
        sae, rates = empty_sae(self.recipe, self.width, k), weights.pop("rates", None)
        sae.load_state_dict(weights, assign=True)
        return SavedSae(sae, about, rates)

    def restore(self, state: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Resume from a state."""

        def part(name: str) -> dict[str, Tensor]:
            return {k[len(name) + 1 :]: t for k, t in state.items() if k.startswith(f"{name}/")}

        self.buffer.restore(part("buffer"), device)
        for k, trainer in self.trainers.items():
            trainer.restore(part(f"k{k}"))
        self.began = bool(state["began"])
        limit = float(state["limit"])
        self.limit = None if math.isnan(limit) else limit
