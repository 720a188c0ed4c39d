"""A training run of all autoencoders that one pass of the model feeds, and its directory.

    RUN/layer5-k50-mask/       an autoencoder, once it is trained
    RUN/state/block-000040/    what a run that was killed resumes from (train/run_directory)

Each (layer, positions) has a stream: a shuffle buffer and one trainer for each K. A stream depends
on its own activations alone, so that an autoencoder does not depend on what is trained together
with it. A state contains weights, moments and buffers, so that a run that was killed resumes bit
for bit. Under torchrun each rank trains some of the autoencoders (sae/training/division), and the
first writes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dlmctl.records.errors import CannotCreateError, DataError
from dlmctl.records.files import read_json, remove_directory, remove_partials, write_file
from dlmctl.records.jsonl import dump
from dlmctl.sae.activations import ActivationBatch, Key
from dlmctl.sae.formats.folders import SavedSae, write_sae
from dlmctl.sae.training.card import sae_card
from dlmctl.sae.training.division import Takers, in_order
from dlmctl.sae.training.stream import Stream
from dlmctl.train.card import last_metrics
from dlmctl.train.distributed import all_gather, broadcast, is_first, world_size
from dlmctl.train.run_directory import (
    STATE_COUNTERS,
    RunDirectory,
    as_json,
    latest_checkpoint,
    read_counters,
)

Placed = tuple[tuple[int, ...], dict[str, Any]]
"""A record, and its place in the order of one process."""
ENDING = "ending.json"
"""Settings, in the state of a run that writes its autoencoders."""


@dataclass
class SaeProgress:
    """Counters of a run, and what it was begun with."""

    settings: dict[str, Any]
    blocks: int = 0
    """Blocks of activations taken in."""
    log: int = 0
    """Bytes of metrics.jsonl."""


class SaeRun:
    """The streams of a run and its directory."""

    def __init__(
        self,
        directory: Path,
        streams: Sequence[Stream],
        settings: Mapping[str, Any],
        metadata: Callable[[Key], Mapping[str, Any]],
        device: torch.device | str,
    ) -> None:
        """Begin a run, or resume the one in the directory.

        Args:
            settings: what a run that is resumed must have been begun with.
            metadata: of the autoencoders of a key.

        Raises:
            UsageError: the run there was begun with other settings.
            CannotCreateError: there is an autoencoder, and no state to resume from, or another kind
                of run.
            DataError: the state is damaged, or one of version 0.1.
            TryAgainError: another process trains in the directory.
            RankError: one of these, on the other ranks.
        """
        self.streams, self.metadata = streams, metadata
        self.directory = RunDirectory(directory, SaeProgress, "block", in_state=True)
        self.progress = SaeProgress(as_json(settings))
        self.progress = self.directory.open(self._check) or self.progress
        if is_first():
            self.directory.cut_metrics(self.progress.log)
        if state := self.directory.checkpoint:
            self._restore(state, device)

    @property
    def blocks(self) -> int:
        """Blocks of activations taken in."""
        return self.progress.blocks

    @property
    def targets(self) -> dict[tuple[Key, int], Path]:
        """Folder of each autoencoder."""
        return {
            (stream.key, k): self.directory.path / folder_name(stream.key, k)
            for stream in self.streams
            for k in stream.ks
        }

    @property
    def takers(self) -> Takers:
        """The ranks that train on each kind of activations."""
        return {stream.key: set(stream.owners.values()) for stream in self.streams}

    @property
    def steps(self) -> int:
        """Steps taken on this rank, of all autoencoders together."""
        return sum(t.step for stream in self.streams for t in stream.trainers.values())

    @property
    def whole(self) -> int:
        """Steps to be taken on this rank in all."""
        return sum(stream.recipe.steps * len(stream.trainers) for stream in self.streams)

    def train(
        self, source: Iterator[ActivationBatch], log_every: int, save_seconds: float
    ) -> Generator[dict[str, Any], None, None]:
        """Train until every autoencoder has had its activations, or the source ends.

        Yields a record of metrics each `log_every` steps of an autoencoder; of several ranks each
        yields those of all.

        Raises:
            DataError: there were not enough activations for a single step.
        """
        saved = time.monotonic()
        while blocks := list(islice(source, world_size())):
            yield from self._logged(self._taken_in(blocks, log_every))
            self.progress.blocks += len(blocks)
            if not any(all_gather(any(stream.wanted for stream in self.streams))):
                break
            if broadcast(time.monotonic() - saved > save_seconds):
                self.save()
                saved = time.monotonic()
        yield from self._logged(self._taken_in([None], log_every))
        self._check_begun()

    def _taken_in(
        self, blocks: Sequence[ActivationBatch | None], log_every: int
    ) -> Iterator[Placed]:
        """Records of what is trained on these blocks, or, with None, on what is left."""
        for number, block in enumerate(blocks):
            for place, stream in enumerate(self.streams):
                if not stream.trainers:
                    continue
                if block is not None:
                    stream.add(block[stream.key])
                for record in stream.train(block is None, log_every):
                    yield (number, place, record["step"], stream.ks.index(record["k"])), record

    def _logged(self, found: Iterator[Placed]) -> Iterator[dict[str, Any]]:
        """Log the records of all ranks, and yield them, in the order of one process."""
        for record in in_order(found):
            self.directory.append(record)
            yield record

    def _check_begun(self) -> None:
        own = [None if s.began or not s.trainers else len(s.buffer) for s in self.streams]
        for stream, counts in zip(self.streams, zip(*all_gather(own), strict=True), strict=True):
            for count in counts:
                if count is not None:
                    raise DataError(
                        f"only {count} activations of layer {stream.key.layer} at positions "
                        f"{stream.key.positions}, fewer than a step of "
                        f"{stream.recipe.batch_size}: give a longer corpus"
                    )

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return self.directory.standing(self.blocks)

    def save(self) -> None:
        """Publish the state as the newest one; of several ranks all call this.

        Raises:
            CannotWriteError: writing failed; the previous state is whole.
        """
        states = ((stream.key, stream.whole_state()) for stream in self.streams)

        def fill(directory: Path) -> None:
            for key, state in states:  # one in memory at a time
                save_file(state, directory / f"{key}.safetensors")

        if is_first():
            self.progress.log = self.directory.metrics_size()
            self.directory.save(self.blocks, self.progress, fill)
        else:
            deque(states, 0)
        broadcast(None)  # the first writes

    def shortfalls(self) -> list[str]:
        """A line for each stream whose input ended before its training did."""
        return [
            f"the input ended after {tokens:,} of {stream.recipe.tokens:,} activations of layer "
            f"{stream.key.layer}, positions {stream.key.positions}"
            for stream, tokens in zip(self.streams, self._tokens(), strict=True)
            if tokens < stream.recipe.steps * stream.recipe.batch_size
        ]

    def _tokens(self) -> list[int]:
        """Activations that the autoencoders of each stream had, on every rank."""
        own = [max((t.tokens for t in s.trainers.values()), default=0) for s in self.streams]
        return [max(numbers) for numbers in zip(*all_gather(own), strict=True)]

    def finish(self) -> list[Path]:
        """Write the autoencoders and drop the state; returns their folders.

        Of several ranks all call this, and the first writes.
        """
        # A run that dies among them, before its first state, may write them again.
        if is_first():
            write_file(self.directory.checkpoints / ENDING, dump(self.progress.settings))
        for stream, tokens in zip(self.streams, self._tokens(), strict=True):
            for k in stream.ks:
                about = {**self.metadata(stream.key), "dlm_tokens": tokens, **stream.recipe.about}
                saved = stream.saved(k, about)
                if saved is not None:
                    self._write(saved, stream, k)
        if is_first():
            self.directory.discard_state()
        return list(self.targets.values())

    def _write(self, saved: SavedSae, stream: Stream, k: int) -> None:
        layer, positions = stream.key
        metrics = last_metrics(self.directory.metrics, layer=layer, k=k, positions=positions)
        card = sae_card(k, saved.sae.d_in, stream.recipe, saved.metadata, metrics)
        write_sae(saved, self.targets[stream.key, k], card=card)

    def _check(self, progress: SaeProgress | None) -> None:
        settings, ending = self.progress.settings, self.directory.checkpoints / ENDING
        if progress is not None:
            self.directory.check_settings(progress.settings, settings)
            return
        self.directory.check_no_results()
        # A run that died while it wrote its autoencoders may write them again.
        ends = ending.exists() and read_json(ending) == settings
        if not ends and any(target.exists() for target in self.targets.values()):
            raise CannotCreateError(
                f"{self.directory} has some of these autoencoders already: choose another -o"
            )

    def _restore(self, state: Path, device: torch.device | str) -> None:
        for stream in self.streams:
            if stream.trainers:
                path = state / f"{stream.key}.safetensors"
                try:
                    stream.restore(load_file(path), device)
                except KeyError as error:
                    raise DataError(
                        f"no {error} in it, which was saved by another version: choose another -o",
                        str(path),
                    ) from None


def finished(directory: Path, names: Sequence[str]) -> bool:
    """Whether a directory, whose lock this process has, contains these autoencoders.

    If it does, what a process that died after the last of them left is removed.
    """
    if not all((directory / name).exists() for name in names):
        return False
    remove_directory(directory / "state")
    remove_partials(directory)
    return True


def begun_with(directory: Path) -> dict[str, Any]:
    """Settings of the run that a directory has a state of; empty if it has none.

    Raises:
        DataError: the state is damaged.
    """
    state = directory / "state"
    if checkpoint := latest_checkpoint(state, STATE_COUNTERS):
        return read_counters(checkpoint / STATE_COUNTERS, SaeProgress).settings
    ending: dict[str, Any] = read_json(state / ENDING) if (state / ENDING).exists() else {}
    return ending


def folder_name(key: Key, k: int) -> str:
    """Name of an autoencoder's folder, as layer5-k50-mask."""
    return f"layer{key.layer}-k{k}-{key.positions}"
