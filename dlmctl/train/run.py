"""A training run: a policy, its frozen reference, the optimizer and the counters, in a directory.

`open_run` begins a run or goes on with the one that the directory holds. With an adapter the
reference is the base model; with full weights it is a second copy of the model the run began with,
loaded when it is first needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dlmctl.models.adapters import merged
from dlmctl.models.loading import checkpoint_revision, fixed_name, load_policy, run_of
from dlmctl.models.policy import Policy
from dlmctl.records.errors import DataError, UsageError
from dlmctl.records.files import make_directory
from dlmctl.records.interrupts import standing
from dlmctl.records.jsonl import Record
from dlmctl.records.locks import Lock, hold_run
from dlmctl.settings.models import Prompting
from dlmctl.settings.optimizer import Adapter, Optimizer
from dlmctl.train.activations import checkpoint_activations
from dlmctl.train.card import last_metrics
from dlmctl.train.checkpoint import (
    Progress,
    forget_steps,
    latest_checkpoint,
    read_progress,
    restore_training,
    save_checkpoint,
)
from dlmctl.train.distributed import agreed, is_first, size
from dlmctl.train.lora import (
    adapter_off,
    adapter_settings,
    add_adapter,
    has_adapter,
    set_adapter_trainable,
)
from dlmctl.train.optimizer import (
    apply_step,
    learning_rate,
    make_optimizer,
    trained_parameters,
)
from dlmctl.train.policy_card import policy_card
from dlmctl.train.sharding import check_trainable, gathered, outline, shard


class Run:
    """State that must stay consistent: policy, optimizer, counters and their directory."""

    def __init__(
        self,
        directory: Path,
        policy: Policy,
        progress: Progress,
        optimization: Optimizer,
        compute_dtype: torch.dtype,
        lock: Lock | None = None,
        form: nn.Module | None = None,
    ) -> None:
        self.directory = directory
        self.lock = lock
        """Of the directory, let go of with the run."""
        self.policy = policy
        self.progress = progress
        self.optimization = optimization
        self.compute_dtype = compute_dtype
        self.parameters: dict[str, nn.Parameter] = trained_parameters(policy.model)
        self.optimizer = make_optimizer(self.parameters.values(), optimization)
        self.saved_step = progress.step
        self.logged_step = progress.step
        """The newest step whose metrics are in metrics.jsonl."""
        self.passed = 0
        """Records of the input that were left out, as they had been trained on."""
        self.revisions = [policy.revision]
        """Hashes of the weights that were published since this process began, the newest last."""
        self._reference: Policy | None = None
        self.about: dict[str, Any] = {}
        """Options of the training that the card of a checkpoint tells, by their names."""
        self._form = form
        """Outline of a model that is spread over several ranks."""

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Within the block matrix products run in the compute dtype."""
        enabled = self.compute_dtype != torch.float32
        # A cache would keep all weights in the compute dtype, too, until the step is over.
        with torch.autocast(
            self.policy.device.type, self.compute_dtype, enabled=enabled, cache_enabled=False
        ):
            yield

    @contextlib.contextmanager
    def reference(self) -> Iterator[Policy]:
        """The frozen reference: the policy with its adapter off, or a second model."""
        if has_adapter(self.policy):
            with adapter_off(self.policy):
                yield self.policy
            return
        if self._reference is None:
            # Scored under the same autocast as the policy, so that equal weights score equal.
            self._reference = merged(
                load_policy(self.progress.reference, str(self.policy.device), "float32")
            )
            if self._reference.revision != self.progress.reference_revision:
                raise DataError(
                    f"{self.progress.reference} has other weights than when this run began; put "
                    "them back, or begin a new run"
                )
            if self._form is not None:
                shard(self._reference)
        yield self._reference

    def step(self) -> dict[str, Any]:
        """Apply the accumulated gradient and count it; returns the metrics of the step."""
        settings = self.optimization
        rate = learning_rate(
            self.progress.step,
            settings.rate,
            settings.warmup,
            settings.schedule,
            settings.total_steps,
        )
        norm, applied = apply_step(
            self.optimizer, self.parameters.values(), rate, settings.max_norm
        )
        self.progress.step += 1
        self.progress.skipped += not applied
        if applied:
            # No longer the weights that records or files know by the old revision.
            base = self.policy.revision.split("+")[0]
            revision = f"{base}+{self.progress.step}"
            self.policy = dataclasses.replace(self.policy, revision=revision)
        return {"grad_norm": norm, "lr": rate, "applied": applied}

    def standing(self) -> str:
        """Where the run is, for those who interrupt it."""
        return standing(self.directory, self.directory / "latest", self.progress.step)

    def whole_policy(self) -> Policy:
        """The policy; of one that is spread over several ranks, on the first, all of it."""
        return self.policy if self._form is None else gathered(self.policy, self._form)

    def untrained(self, records: Iterator[Record]) -> Iterator[Record] | None:
        """The records behind those that the run has trained on, which come first; None: no more."""
        sound = 0
        while sound < self.progress.completions:
            record = next(records, None)
            if record is None:
                break
            sound += "error" not in record
            self.passed += 1
        if sound:
            print(f"dlmctl: {sound} records were trained on already", file=sys.stderr)
        first = next(records, None)
        if first is not None or not sound:
            return chain([] if first is None else [first], records)
        print(f"dlmctl: {self.directory} is at the end of its input", file=sys.stderr)
        return None

    def save(self, keep: int) -> Path:
        """Publish the newest checkpoint; of several ranks all call this, and leave it together."""
        self.saved_step = self.progress.step
        metrics = last_metrics(self.directory / "metrics.jsonl", step=self.progress.step)
        settings = {**self.about, **dataclasses.asdict(self.optimization)}
        checkpoint = save_checkpoint(
            self.directory,
            self.policy,
            self.optimizer,
            self.parameters,
            self.progress,
            keep,
            self.whole_policy,
            lambda whole: policy_card(whole, self.progress, settings, metrics),
        )
        revision = ""
        if is_first():
            revision = checkpoint_revision(checkpoint, self.progress.reference_revision)
        revision = agreed(revision)
        self.policy = dataclasses.replace(self.policy, revision=revision)
        self.revisions.append(revision)
        return checkpoint


def next_run(algo: str) -> Path:
    """The first of runs/ALGO-1, runs/ALGO-2, … that is not there."""
    return next(p for n in count(1) if not (p := Path("runs") / f"{algo}-{n}").exists())


def open_run(
    directory: Path,
    model: str | None,
    algo: str,
    optimization: Optimizer,
    adapter: Adapter,
    device: str,
    dtype: str,
    gradient_checkpointing: bool,
    seed: int,
    otherwise: str = "builtin:puzzles",
    prompting: Prompting | None = None,
) -> Run:
    """Begin a run in `directory`, or resume the one that is there.

    A model with an adapter is trained with the adapter merged into its weights, which are then the
    reference. Of several ranks each loads the whole model, and keeps its share of it.

    Args:
        model: what to begin from, as the user names it; None: from `otherwise`.

    Raises:
        UsageError: the run in the directory trains by another algorithm, from another model or
            other parts of it, or several ranks cannot train the model.
        MissingInputError: the model is not there.
        TryAgainError: another process trains in the directory.
    """
    lock = None
    if is_first():
        make_directory(directory)
        lock = hold_run(directory)
    torch.manual_seed(seed)  # the first values of an adapter, and its dropout
    checkpoint = latest_checkpoint(directory)
    compute = torch.float32
    if checkpoint is None:
        precision = "float32" if adapter.rank == 0 else dtype
        policy = merged(load_policy(fixed_name(model or otherwise), device, precision, prompting))
        progress = Progress(algo, policy.name, policy.revision)
        if adapter.rank:
            policy = add_adapter(policy, adapter)
    else:
        progress = read_progress(checkpoint)
        if progress.algo != algo:
            raise UsageError(
                f"{directory} is a run of --algo {progress.algo}, not {algo}: choose another -o, "
                f"or begin from it with --model {directory}"
            )
        if model is not None:
            _check_model(model, directory, progress.reference)
        full = not (checkpoint / "adapter_config.json").exists()
        policy = load_policy(str(checkpoint), device, "float32" if full else dtype, prompting)
        _check_adapter(adapter, policy, directory)
        if has_adapter(policy):
            set_adapter_trainable(policy)
    if dtype != "auto":
        compute = getattr(torch, dtype)
    elif policy.device.type == "cuda":
        compute = torch.bfloat16
    if gradient_checkpointing:
        checkpoint_activations(policy.core)
    form = None
    if size() > 1:
        check_trainable(policy)
        form = outline(policy.model)
        shard(policy)
    run = Run(directory, policy, progress, optimization, compute, lock, form)
    if checkpoint is not None:
        restore_training(checkpoint, run.optimizer, run.parameters)
    if is_first():
        forget_steps(directory, progress.step)
    return run


def _check_model(model: str, directory: Path, reference: str) -> None:
    """Refuse to resume a run with another model than it began with, or a checkpoint of its own."""
    named = run_of(fixed_name(model))
    if named != run_of(reference) and named[0] != directory.resolve():
        raise UsageError(
            f"{directory} began with {reference}, not with {model}: leave --model out to resume "
            "it, or choose another -o to begin anew"
        )


def _check_adapter(wanted: Adapter, policy: Policy, directory: Path) -> None:
    """Refuse to resume a run with an adapter that it does not have."""
    if wanted.rank == 0:
        return
    has = adapter_settings(policy)
    if has is None:
        raise UsageError(
            f"{directory} trains all weights, not an adapter: leave --lora-rank out to resume it, "
            f"or begin from it with --model {directory} and another -o"
        )
    if has != wanted:
        raise UsageError(
            f"{directory} trains an adapter of rank {has.rank}, alpha {has.alpha:g} and dropout "
            f"{has.dropout:g}: give --lora-rank, --lora-alpha and --lora-dropout as it has them, "
            "or choose another -o"
        )
