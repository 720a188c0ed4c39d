"""A training run: all autoencoders that one pass of the model feeds, in a directory.

    DIRECTORY/layer5-k50-mask/       an autoencoder, once it is trained
    DIRECTORY/metrics.jsonl
    DIRECTORY/state/latest           link to the newest state; gone when the run is done

Each (layer, positions) has a stream: a shuffle buffer and one trainer for each K. What a stream
does depends on its own activations alone, so that an autoencoder comes out the same whatever is
trained beside it. A state holds weights, moments and buffers, so that a run that was killed goes on
bit for bit. Under torchrun each rank trains some of the autoencoders (sae/training/division), and
the first writes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

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
from dlmctl.records.locks import Lock, hold_run
from dlmctl.sae.activations import ActivationBatch, Key
from dlmctl.sae.formats.folders import SavedSae, write_sae
from dlmctl.sae.training.card import sae_card
from dlmctl.sae.training.division import Takers, in_order
from dlmctl.sae.training.stream import Stream
from dlmctl.train.card import last_metrics
from dlmctl.train.distributed import (
    agreed,
    from_all,
    from_first,
    is_first,
    size,
)

Placed = tuple[tuple[int, ...], dict[str, Any]]
"""A record, and what it comes by in the order of one process."""
ENDING = "ending.json"
"""In the state of a run that writes its autoencoders: its settings."""


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
            RankError: one of these, on the other ranks.
        """
        self.lock: Lock | None = None
        self.directory, self.streams = directory, streams
        self.settings, self.metadata = settings, metadata
        self.blocks = 0
        """Blocks of activations taken in."""
        if state := from_first(self._open):
            self._restore(directory / "state" / state, device)

    @property
    def targets(self) -> dict[tuple[Key, int], Path]:
        """Folder of each autoencoder."""
        return {
            (stream.key, k): self.directory / folder_name(stream.key, k)
            for stream in self.streams
            for k in stream.ks
        }

    @property
    def takers(self) -> Takers:
        """The ranks that train on each kind of activations."""
        return {stream.key: set(stream.owners.values()) for stream in self.streams}

    @property
    def steps(self) -> int:
        """Steps that were taken here, of all autoencoders together."""
        return sum(t.step for stream in self.streams for t in stream.trainers.values())

    @property
    def whole(self) -> int:
        """Steps that are to be taken here in all."""
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
        while blocks := list(islice(source, size())):
            yield from self._logged(self._taken_in(blocks, log_every))
            self.blocks += len(blocks)
            if not any(from_all(any(stream.wanted for stream in self.streams))):
                break
            if agreed(time.monotonic() - saved > save_seconds):
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
                reserve = 0
                if block is not None:
                    stream.add(block[stream.key])
                    reserve = stream.buffer.capacity // 2
                for record in stream.train(reserve, log_every):
                    yield (number, place, record["step"], stream.ks.index(record["k"])), record

    def _logged(self, found: Iterator[Placed]) -> Iterator[dict[str, Any]]:
        """The records of all ranks in the order of a single one, the first having noted them."""
        for record in in_order(found):
            if is_first():
                append_line(self.directory / "metrics.jsonl", dump(record))
            yield record

    def _check_begun(self) -> None:
        own = [None if s.began or not s.trainers else len(s.buffer) for s in self.streams]
        for stream, counts in zip(self.streams, zip(*from_all(own), strict=True), strict=True):
            for count in counts:
                if count is not None:
                    raise DataError(
                        f"only {count} activations of layer {stream.key.layer} at positions "
                        f"{stream.key.positions}, fewer than a step of "
                        f"{stream.recipe.batch_size}: give a longer corpus"
                    )

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return standing(self.directory, self.directory / "state" / "latest", self.blocks, "block")

    def save(self) -> None:
        """Publish the state as the newest one; of several ranks all call this.

        Raises:
            CannotWriteError: writing failed; the state before is whole.
        """
        parent = self.directory / "state"
        target = parent / f"block-{self.blocks:08d}"
        states = ((stream.key, stream.whole_state()) for stream in self.streams)
        if not is_first():
            deque(states, 0)
            agreed(None)  # the first writes
            return
        log = self.directory / "metrics.jsonl"
        log.touch()
        about = {"blocks": self.blocks, "log": log.stat().st_size, "settings": self.settings}

        def fill(directory: Path) -> None:
            for key, state in states:
                save_file(state, directory / f"{key}.safetensors")
            (directory / "run.json").write_text(json.dumps(about, indent=2) + "\n")

        publish_directory(target, fill)
        publish_link(parent / "latest", target.name)
        for old in parent.glob("block-*"):
            if old != target:
                shutil.rmtree(old, ignore_errors=True)
        agreed(None)

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
        return [max(numbers) for numbers in zip(*from_all(own), strict=True)]

    def finish(self) -> list[Path]:
        """Write the autoencoders and drop the state; returns their folders.

        Of several ranks all call this, and the first writes.
        """
        # A run that dies among them, before its first state, may write them again.
        if is_first():
            write_file(self.directory / "state" / ENDING, dump(self.settings))
        for stream, tokens in zip(self.streams, self._tokens(), strict=True):
            for k in stream.ks:
                about = {**self.metadata(stream.key), "dlm_tokens": tokens}
                saved = stream.saved(k, about)
                if saved is not None:
                    self._write(saved, stream, k)
        if is_first():
            remove_directory(self.directory / "state")
        return list(self.targets.values())

    def _write(self, saved: SavedSae, stream: Stream, k: int) -> None:
        layer, positions = stream.key
        log = self.directory / "metrics.jsonl"
        metrics = last_metrics(log, layer=layer, k=k, positions=positions)
        card = sae_card(k, saved.sae.d_in, stream.recipe, saved.metadata, metrics)
        write_sae(saved, self.targets[stream.key, k], card=card)

    def _open(self) -> str:
        """Take the directory; the name of the state to go on from, or none."""
        make_directory(self.directory)
        self.lock = hold_run(self.directory)
        latest = self.directory / "state" / "latest"
        remove_partials(self.directory)
        remove_partials(latest.parent)
        log, state = self.directory / "metrics.jsonl", ""
        if (latest / "run.json").exists():
            about = read_json(latest / "run.json")
            self._check(about["settings"])
            if log.exists():
                with log.open("r+b") as file:  # what was logged after the state will be again
                    file.truncate(about["log"])
            state = latest.resolve().name
        elif any(target.exists() for target in self.targets.values()) and not self._ending():
            raise CannotCreateError(
                f"{self.directory} has some of these autoencoders already: choose another -o"
            )
        else:
            log.unlink(missing_ok=True)
        make_directory(self.directory / "state")
        return state

    def _ending(self) -> bool:
        """Whether a run of these settings died while it wrote its autoencoders."""
        path = self.directory / "state" / ENDING
        return path.exists() and read_json(path) == json.loads(json.dumps(self.settings))

    def _check(self, settings: Mapping[str, Any]) -> None:
        if settings != json.loads(json.dumps(self.settings)):
            changed = [n for n, v in settings.items() if self.settings.get(n) != v]
            raise UsageError(
                f"{self.directory} holds a run with another {', '.join(changed) or 'setting'}: "
                "give the same options to go on with it, or choose another -o"
            )

    def _restore(self, state: Path, device: torch.device | str) -> None:
        for stream in self.streams:
            if stream.trainers:
                stream.restore(load_file(state / f"{stream.key}.safetensors"), device)
        self.blocks = read_json(state / "run.json")["blocks"]


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
