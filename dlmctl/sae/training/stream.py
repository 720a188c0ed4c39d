"""The autoencoders of one kind of activations: a shuffle buffer and a trainer for each K."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dlmctl.diffusion.noise import stream_key
from dlmctl.sae.activations import Key
from dlmctl.sae.formats.folders import SavedSae
from dlmctl.sae.topk import TopKSae
from dlmctl.sae.training.buffer import ShuffleBuffer
from dlmctl.sae.training.trainer import SaeTrainer
from dlmctl.settings.sae import SaeRecipe
from dlmctl.train.distributed import rank, tensors_of


class Stream:
    """The autoencoders of one kind of activations."""

    def __init__(
        self,
        key: Key,
        ks: Sequence[int],
        recipe: SaeRecipe,
        width: int,
        buffer_bytes: int,
        drop_norms: float | None,
        device: torch.device | str,
        owners: Mapping[int, int] | None = None,
    ) -> None:
        """Args:
        ks: of its autoencoders.
        buffer_bytes: of the shuffle buffer.
        drop_norms: activations above so many times the median norm are left out.
        owners: the rank that trains each K; None is this one. A rank without any needs no
            buffer.
        """
        seed = stream_key(recipe.seed, "sae", key.layer, key.positions)
        self.key, self.recipe, self.drop_norms = key, recipe, drop_norms
        least, every = 2 * recipe.batch_size, recipe.steps * recipe.batch_size
        self.buffer = ShuffleBuffer(buffer_bytes, seed, least, every)
        self.ks, self.width = ks, width
        self.owners = owners or dict.fromkeys(ks, rank())
        own = [k for k in ks if self.owners[k] == rank()]
        self.trainers = {k: SaeTrainer(recipe, width, k, seed, device) for k in own}
        self.limit: float | None = None
        """Norm above which activations are dropped."""
        self.began = False

    @property
    def finished(self) -> bool:
        return all(trainer.finished for trainer in self.trainers.values())

    @property
    def wanted(self) -> int:
        """Activations that are to come in still."""
        if not self.trainers:
            return 0
        done = next(iter(self.trainers.values())).tokens
        return self.recipe.steps * self.recipe.batch_size - done - len(self.buffer)

    def add(self, rows: Tensor) -> None:
        """Take in activations [N, d], as many as are wanted."""
        if self.limit is not None:
            rows = rows[rows.float().norm(dim=1) <= self.limit]
        self.buffer.add(rows[: self.wanted])

    def train(self, reserve: int, log_every: int = 1) -> Iterator[dict[str, Any]]:
        """Train while more than `reserve` activations are left.

        Yields the metrics of the first step of each autoencoder and of every `log_every`-th.
        """
        size = self.recipe.batch_size
        while not self.finished and len(self.buffer) >= reserve + size:
            if not self.began:
                self._begin()
                continue
            x = self.buffer.draw(size)
            for k, trainer in self.trainers.items():
                measured = trainer.step == 0 or (trainer.step + 1) % log_every == 0
                metrics = trainer.train_step(x, measured)
                if measured:
                    about = {"layer": self.key.layer, "k": k, "positions": self.key.positions}
                    yield about | metrics

    def _begin(self) -> None:
        if self.drop_norms is not None:
            norms = self.buffer.rows.float().norm(dim=1)
            self.limit = self.drop_norms * float(norms.median())
            self.buffer.keep(norms <= self.limit)
        for trainer in self.trainers.values():
            trainer.begin(self.buffer.rows)
        self.began = True

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        parts = {"buffer": self.buffer.state()}
        parts |= {f"k{k}": trainer.state() for k, trainer in self.trainers.items()}
        own = {"began": torch.tensor(self.began), "limit": torch.tensor(self.limit or torch.nan)}
        tensors = {f"{name}/{key}": t for name, part in parts.items() for key, t in part.items()}
        return own | tensors

    def whole_state(self) -> dict[str, Tensor]:
        """The state, on the first rank, with what others train of it; all of them call this."""
        parts = [tensors_of(owner, self.state) for owner in dict.fromkeys(self.owners.values())]
        return {name: tensor for part in parts for name, tensor in part.items()}

    def saved(self, k: int, about: Mapping[str, Any]) -> SavedSae | None:
        """What the autoencoder of this K has learnt, on the first rank; all of them call this."""

        def make() -> dict[str, Tensor]:
            made = self.trainers[k].saved(about)
            rates = {} if made.firing_rate is None else {"rates": made.firing_rate}
            return {**made.sae.state_dict(), **rates}

        weights = tensors_of(self.owners[k], make)
        if not weights:
            return None
        sae, rates = TopKSae(self.width, self.recipe.latents, k), weights.pop("rates", None)
        sae.load_state_dict(weights, assign=True)
        return SavedSae(sae, about, rates)

    def restore(self, state: Mapping[str, Tensor], device: torch.device | str) -> None:
        """Go on from a state."""

        def part(name: str) -> dict[str, Tensor]:
            return {k[len(name) + 1 :]: t for k, t in state.items() if k.startswith(f"{name}/")}

        self.buffer.restore(part("buffer"), device)
        for k, trainer in self.trainers.items():
            trainer.restore(part(f"k{k}"))
        self.began = bool(state["began"])
        limit = float(state["limit"])
        self.limit = None if limit != limit else limit
