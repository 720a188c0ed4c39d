"""A training run: all autoencoders that one pass of the model feeds, in a directory.

    DIRECTORY/layer5-k50-mask/       an autoencoder, once it is trained
    DIRECTORY/metrics.jsonl
    DIRECTORY/state/latest           link to the newest state; gone when the run is done

Each (layer, positions) has a stream: a shuffle buffer and one trainer for each K. What a stream
does depends on its own activations alone, so that an autoencoder comes out the same whatever is
trained beside it. A state holds weights, moments and buffers, so that a run that was killed goes on
bit for bit.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dlmctl.diffusion.noise import stream_key
from dlmctl.records.errors import CannotCreateError, DataError, UsageError
from dlmctl.records.files import (
    append_line,
    make_directory,
    publish_directory,
    publish_link,
    read_json,
    remove_directory,
    remove_partials,
    write_file,
)
from dlmctl.records.interrupts import standing
from dlmctl.records.jsonl import dump
from dlmctl.records.locks import hold_run
from dlmctl.sae.activations import Block, Key
from dlmctl.sae.buffer import ShuffleBuffer
from dlmctl.sae.card import sae_card
from dlmctl.sae.folders import write_sae
from dlmctl.sae.trainer import Recipe, SaeTrainer
from dlmctl.training.card import last_metrics

ENDING = "ending.json"
"""In the state of a run that writes its autoencoders: its settings."""


class Stream:
    """The autoencoders of one kind of activations."""

    def __init__(
        self,
        key: Key,
        ks: Sequence[int],
        recipe: Recipe,
        width: int,
        buffer_bytes: int,
        drop_norms: float | None,
        device: torch.device | str,
    ) -> None:
        seed = stream_key(recipe.seed, "sae", key.layer, key.positions)
        capacity = max(2 * recipe.batch_size, buffer_bytes // (4 * width))
        capacity = min(capacity, recipe.steps * recipe.batch_size)
        self.key, self.recipe, self.drop_norms = key, recipe, drop_norms
        self.buffer = ShuffleBuffer(capacity, seed)
        self.trainers = {k: SaeTrainer(recipe, width, k, seed, device) for k in ks}
        self.limit: float | None = None
        """Norm above which activations are dropped."""
        self.began = False

    @property
    def finished(self) -> bool:
        return all(trainer.finished for trainer in self.trainers.values())

    @property
    def wanted(self) -> int:
        """Activations that are to come in still."""
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


class SaeRun:
    """The streams of a run and the directory it lives in."""

    def __init__(
        self,
        directory: Path,
        streams: Sequence[Stream],
        settings: Mapping[str, Any],
        metadata: Callable[[Key], Mapping[str, Any]],
        device: torch.device | str,
    ) -> None:
        """Begin a run, or go on with the one that the directory holds.

        Args:
            settings: what a run that is gone on with must have been begun with.
            metadata: of the autoencoders of a key.

        Raises:
            UsageError: the run there was begun with other settings.
            CannotCreateError: there is an autoencoder, and no state to go on from.
            TryAgainError: another process trains in the directory.
        """
        make_directory(directory)
        self.lock = hold_run(directory)
        self.directory, self.streams = directory, streams
        self.settings, self.metadata = settings, metadata
        self.blocks = 0
        """Blocks of activations taken in."""
        latest = directory / "state" / "latest"
        remove_partials(directory)
        remove_partials(latest.parent)
        if (latest / "run.json").exists():
            self._restore(latest, device)
        elif any(target.exists() for target in self.targets.values()) and not self._ending():
            raise CannotCreateError(
                f"{directory} has some of these autoencoders already: choose another -o"
            )
        else:
            (directory / "metrics.jsonl").unlink(missing_ok=True)
        make_directory(directory / "state")

    @property
    def targets(self) -> dict[tuple[Key, int], Path]:
        """Folder of each autoencoder."""
        return {
            (stream.key, k): self.directory / folder_name(stream.key, k)
            for stream in self.streams
            for k in stream.trainers
        }

    @property
    def steps(self) -> int:
        """Steps that were taken, of all autoencoders together."""
        return sum(t.step for stream in self.streams for t in stream.trainers.values())

    def train(
        self, source: Iterator[Block], log_every: int, save_seconds: float
    ) -> Iterator[dict[str, Any]]:
        """Train until every autoencoder has had its activations, or the source ends.

        Yields a record of metrics each `log_every` steps of an autoencoder.

        Raises:
            DataError: there were not enough activations for a single step.
        """
        saved = time.monotonic()

        def logged(records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            for record in records:
                append_line(self.directory / "metrics.jsonl", dump(record))
                yield record

        for block in source:
            for stream in self.streams:
                stream.add(block[stream.key])
                yield from logged(stream.train(stream.buffer.capacity // 2, log_every))
            self.blocks += 1
            if not any(stream.wanted for stream in self.streams):
                break
            if time.monotonic() - saved > save_seconds:
                self.save()
                saved = time.monotonic()
        for stream in self.streams:
            yield from logged(stream.train(0, log_every))
            if not stream.began:
                raise DataError(
                    f"only {len(stream.buffer)} activations of layer {stream.key.layer} at "
                    f"positions {stream.key.positions}, fewer than a step of "
                    f"{stream.recipe.batch_size}: give a longer corpus"
                )

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return standing(self.directory, self.directory / "state" / "latest", self.blocks, "block")

    def save(self) -> None:
        """Publish the state as the newest one.

        Raises:
            CannotWriteError: writing failed; the state before is whole.
        """
        parent = self.directory / "state"
        target = parent / f"block-{self.blocks:08d}"
        log = self.directory / "metrics.jsonl"
        log.touch()
        about = {"blocks": self.blocks, "log": log.stat().st_size, "settings": self.settings}

        def fill(directory: Path) -> None:
            for stream in self.streams:
                save_file(stream.state(), directory / f"{stream.key}.safetensors")
            (directory / "run.json").write_text(json.dumps(about, indent=2) + "\n")

        publish_directory(target, fill)
        publish_link(parent / "latest", target.name)
        for old in parent.glob("block-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)

    def shortfalls(self) -> list[str]:
        """A line for each stream whose input ended before its training did."""
        return [
            f"the input ended after {tokens:,} of {stream.recipe.tokens:,} activations of layer "
            f"{stream.key.layer}, positions {stream.key.positions}"
            for stream in self.streams
            if (tokens := min(t.tokens for t in stream.trainers.values()))
            < stream.recipe.steps * stream.recipe.batch_size
        ]

    def finish(self) -> list[Path]:
        """Write the autoencoders and drop the state; returns their folders."""
        # A run that dies among them, before its first state, may write them again.
        write_file(self.directory / "state" / ENDING, dump(self.settings))
        for stream in self.streams:
            for k, trainer in stream.trainers.items():
                about = {**self.metadata(stream.key), "dlm_tokens": trainer.tokens}
                saved, key = trainer.saved(about), stream.key
                metrics = last_metrics(
                    self.directory / "metrics.jsonl",
                    layer=key.layer,
                    k=k,
                    positions=key.positions,
                )
                card = sae_card(k, saved.sae.d_in, stream.recipe, about, metrics)
                write_sae(saved, self.targets[key, k], card=card)
        remove_directory(self.directory / "state")
        return list(self.targets.values())

    def _ending(self) -> bool:
        """Whether a run of these settings died while it wrote its autoencoders."""
        path = self.directory / "state" / ENDING
        return path.exists() and read_json(path) == json.loads(json.dumps(self.settings))

    def _restore(self, state: Path, device: torch.device | str) -> None:
        about = read_json(state / "run.json")
        if about["settings"] != json.loads(json.dumps(self.settings)):
            changed = [n for n, v in about["settings"].items() if self.settings.get(n) != v]
            raise UsageError(
                f"{self.directory} holds a run with another {', '.join(changed) or 'setting'}: "
                "give the same options to go on with it, or choose another -o"
            )
        for stream in self.streams:
            stream.restore(load_file(state / f"{stream.key}.safetensors"), device)
        self.blocks = about["blocks"]
        log = self.directory / "metrics.jsonl"
        if log.exists():
            with log.open("r+b") as file:  # what was logged after the state will be again
                file.truncate(about["log"])


def finished(directory: Path, names: Sequence[str]) -> bool:
    """Whether a directory, which we have the lock of, has these autoencoders.

    What a process that died behind the last of them left is removed.
    """
    if not all((directory / name).exists() for name in names):
        return False
    remove_directory(directory / "state")
    remove_partials(directory)
    return True


def folder_name(key: Key, k: int) -> str:
    """Name of an autoencoder's folder, as layer5-k50-mask."""
    return f"layer{key.layer}-k{k}-{key.positions}"
